"""Causal linear attention on features given as arrays, with or without decay: the engine under `pallas_kernels.based`."""

from pallas_kernels.linear_attention.api import linear_attention

__all__ = ["linear_attention"]
