"""Causal linear attention with the second-order Taylor feature map (BASED, arXiv 2402.18668)."""

from pallas_kernels.based.api import based
from pallas_kernels.based.feature_map import (
    expanded_width,
    pack_state,
    taylor_features,
    unpack_state,
)

__all__ = ["based", "expanded_width", "pack_state", "taylor_features", "unpack_state"]
