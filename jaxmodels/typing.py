"""The dimension legend of the library, and the aliases that use it.

One letter per dimension, the same letter everywhere:

    b  batch                      h  query heads
    t  query position             g  key/value heads (h is a multiple of g)
    s  key position               k, v  key and value width per head
    d  model width                f  feature-map input width
    n  Monarch block count        e  expanded feature width
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from jax import Array
from jaxtyping import Bool, Float, Int

Activations: TypeAlias = Float[Array, "b t d"]
SegmentIds: TypeAlias = Int[Array, "b t"]
Mask: TypeAlias = Bool[Array, "b t"]
State: TypeAlias = dict[str, Any]
Params: TypeAlias = Mapping[str, Any]
Dtype: TypeAlias = Any
Initializer: TypeAlias = Any
