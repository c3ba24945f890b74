"""Causal linear attention with the second-order Taylor feature map (BASED, arXiv 2402.18668)."""

from pallas_kernels.based.api import based
from pallas_kernels.based.feature_map import (
    expanded_width,
    pack_state,
    taylor_features,
    unpack_state,
)
from pallas_kernels.based.prefix import bidirectional_based, prefix_based
from pallas_kernels.based.sharded import based_sharded

__all__ = [
    "based",
    "based_sharded",
    "bidirectional_based",
    "expanded_width",
    "pack_state",
    "prefix_based",
    "taylor_features",
    "unpack_state",
]
