"""Causal long convolution: one filter per channel, as long as the sequence, segments kept apart."""

from pallas_kernels.long_conv.api import long_conv, long_conv_history

__all__ = ["long_conv", "long_conv_history"]
