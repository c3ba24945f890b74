"""Causal softmax attention. `attention` is the op; see api.py for its maths."""

from pallas_kernels.attention.api import attention

__all__ = ["attention"]
