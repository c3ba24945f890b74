"""The door of every model: whatever padding comes in, the mixers see it at the end of the row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int, Shaped


class Door(NamedTuple):
    """Tokens in the mixers' order, and the way back."""

    tokens: Shaped[Array, "b t ..."]
    segment_ids: Int[Array, "b t"]
    inverse: Int[Array, "b t"]

    def leave(self, y: Shaped[Array, "b t ..."]) -> Shaped[Array, "b t ..."]:
        """Outputs back in the caller's order."""
        return _take(y, self.inverse)


def enter(tokens: Shaped[Array, "b t ..."], segment_ids: Int[Array, "b t"]) -> Door:
    """Moves padding (id 0), wherever it stands, behind the real tokens of its row; their order is kept.

    Raises ValueError for negative or decreasing positive ids when they are concrete. Under jit a decreasing id is raised
    to the largest before it, and a negative one becomes padding.
    """
    if not isinstance(segment_ids, Tracer):
        _check(segment_ids)
    ids = jnp.maximum(segment_ids.astype(jnp.int32), 0)
    ids = jnp.where(ids > 0, jax.lax.cummax(ids, axis=1), 0)
    order = jnp.argsort(ids == 0, axis=1, stable=True)
    return Door(_take(tokens, order), _take(ids, order), jnp.argsort(order, axis=1))


def _take(x, order):
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)


def _check(segment_ids) -> None:
    for row in jax.device_get(segment_ids):
        real = row[row != 0]
        if (real < 0).any() or (real[1:] < real[:-1]).any():
            raise ValueError(
                f"segment_ids must be 0 (padding) or positive and never decrease along a row; found {row.tolist()}"
            )
