"""Causal softmax attention. `attention` is the op; see api.py for its maths."""

from pallas_kernels.attention.api import attention
from pallas_kernels.attention.decode import attend_to_cache

__all__ = ["attend_to_cache", "attention"]
