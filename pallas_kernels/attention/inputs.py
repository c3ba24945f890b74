"""What attention and sliding-window attention do with their arguments before any implementation sees them."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.attention.dropout import row_bits


class Inputs(NamedTuple):
    """Checked arguments; padded slots of q, k and v hold zeros."""

    q: Float[Array, "b t h k"]
    k: Float[Array, "b s g k"]
    v: Float[Array, "b s g v"]
    q_ids: Int[Array, "b t"] | None
    k_ids: Int[Array, "b s"] | None
    bits: UInt32[Array, "b t h 2"] | None
    scale: float

    def last_keys(self, count: int) -> "Inputs":
        """Without all but the last `count` keys."""
        s = self.k.shape[1]
        if count >= s:
            return self
        ids = None if self.k_ids is None else self.k_ids[:, s - count :]
        return self._replace(k=self.k[:, s - count :], v=self.v[:, s - count :], k_ids=ids)


def prepare(
    q, k, v, q_segment_ids, k_segment_ids, scale, dropout_rate: float, dropout_key
) -> Inputs:
    """Raises ValueError for shapes and values that do not fit; draws the bits of dropout."""
    check_shapes(q, k, v, q_segment_ids, k_segment_ids)
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), not {dropout_rate}")
    bits = None
    if dropout_rate > 0:
        if dropout_key is None:
            raise ValueError(f"dropout_rate={dropout_rate} needs a dropout_key")
        bits = row_bits(dropout_key, q.shape[:3])
    if q_segment_ids is not None:
        q = zero_padded(q, q_segment_ids)
        k, v = (zero_padded(x, k_segment_ids) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return Inputs(q, k, v, q_segment_ids, k_segment_ids, bits, scale)


def zero_padded(x: Float[Array, "b t ..."], ids: Int[Array, "b t"] | None):
    """x with 0 wherever the id is 0, so that nothing which padding holds, NaN included, reaches a product or a gradient."""
    return x if ids is None else jnp.where((ids > 0)[..., None, None], x, 0)


def check_shapes(q, k, v, q_ids, k_ids) -> None:
    """ValueError with what was wrong and what would be right."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} must be [b, t, h, k], [b, s, g, k], [b, s, g, v]"
        )
    b, t, h, width = q.shape
    s, g = k.shape[1:3]
    if k.shape != (b, s, g, width) or v.shape[:3] != (b, s, g):
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} do not fit: they are [b, t, h, k], [b, s, g, k], [b, s, g, v]"
        )
    if g == 0 or h % g:
        raise ValueError(f"{h} query heads cannot share {g} key/value heads evenly")
    if s < t:
        raise ValueError(
            f"{t} queries need at least as many keys, not {s}: keys end where queries end"
        )
    if (q_ids is None) != (k_ids is None):
        raise ValueError("give segment ids for queries and for keys, or for neither")
    for name, ids, length in (("q_segment_ids", q_ids, t), ("k_segment_ids", k_ids, s)):
        if ids is None:
            continue
        if ids.shape != (b, length):
            raise ValueError(f"{name} is {ids.shape}, not {(b, length)}")
        if not isinstance(ids, Tracer) and (np.asarray(ids) < 0).any():
            raise ValueError(f"{name} must be 0 (padding) or positive")


def check_name(implementation: str | None, names: tuple[str, ...]) -> None:
    """ValueError for an implementation that does not exist."""
    if implementation is not None and implementation not in names:
        raise ValueError(f"unknown implementation {implementation!r}; there are {', '.join(names)}")
