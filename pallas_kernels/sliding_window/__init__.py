"""Softmax attention to the last few keys. `sliding_window` is the op; see api.py for its maths."""

from pallas_kernels.sliding_window.api import sliding_window

__all__ = ["sliding_window"]
