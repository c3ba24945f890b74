"""Inside `jax.shard_map` an array is known to vary over mesh axes or not; a scan wants its carry to vary as its results do."""

from typing import Any

import jax
from jaxtyping import Array


def varying_like(x: Array, arrays: Any) -> Array:
    """x, marked as varying over every axis that one of the arrays varies over; x itself outside of shard_map."""
    axes = frozenset().union(
        *(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(arrays))
    )
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
