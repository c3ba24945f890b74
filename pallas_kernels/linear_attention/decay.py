"""Decay inside a chunk, without ever taking the exponential of a positive number.

A token j reaches a later token i through exp(a_(j+1) + ... + a_i), a <= 0. The usual factors exp(A_i) exp(-A_j) of the prefix
sums A overflow after a few strong decays, so every form here exponentiates differences of prefix sums, which are <= 0. Those
differences must survive large sums: 64 tokens of a = -20 bring float32 prefix sums to -1,280, where their spacing, 1e-4, would
be the relative error of every later weight. So a prefix sum is kept as two: of a rounded to multiples of 2^-8, which float32
adds exactly, and of the small rest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SUBCHUNK = 16  # per-channel decay is pairwise within this many tokens, and a matrix product beyond


class Prefix(NamedTuple):
    """Inclusive sums over the tokens of a chunk: coarse (exact) + fine."""

    coarse: Any
    fine: Any

    def at(self, index: Any, axis: int) -> "Prefix":
        return Prefix(*(jax.lax.index_in_dim(x, index, axis) for x in self))

    def minus(self, other: "Prefix") -> Array:
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def whole(self) -> Array:
        return self.coarse + self.fine

    def over_queries(self) -> "Prefix":
        """[b, g, t] to [b, g, 1, t], for the query heads of a group."""
        return Prefix(*(x[:, :, None] for x in self))


def prefix_sums(a: Float[Array, "..."], axis: int) -> Prefix:
    """Of log decays: 0 or less, -inf (forget everything) included."""
    # exp is 0 below: a sum that passes it need not be told apart from -inf, and stays finite.
    a = jnp.maximum(a, -128.0 if a.dtype.itemsize <= 4 else -800.0)
    coarse = jax.lax.stop_gradient(jnp.round(a * 256) / 256)
    return Prefix(jnp.cumsum(coarse, axis), jnp.cumsum(a - coarse, axis))


def pair_factors(a: Prefix, visible: Bool[Array, "..."]) -> Float[Array, "..."]:
    """exp(A_i - A_j) where visible, else 0: [..., t, t] of sums [..., t]."""
    rows, columns = (Prefix(*(jnp.expand_dims(x, d) for x in a)) for d in (-1, -2))
    return jnp.exp(jnp.where(visible, rows.minus(columns), -jnp.inf))


def channel_weights(
    q: Float[Array, "b g r t e"], k: Float[Array, "b g t e"], a: Prefix, precision: dict[str, Any]
) -> Float[Array, "b g r t t"]:
    """sum_c q_ic k_jc exp(A_ic - A_jc) for j <= i; what stands above the diagonal is 0. t is a multiple of SUBCHUNK.

    Blocks of SUBCHUNK rows. A key before the block goes through the block's start, exp(A_i - start) exp(start - A_j), two
    factors of at most 1 and a matrix product; a key inside the block is weighed channel by channel.
    """
    b, g, r, t, e = q.shape
    n, c = t // SUBCHUNK, SUBCHUNK
    blocks = Prefix(*(x.reshape(b, g, n, c, e) for x in a))
    start = Prefix(
        *(jnp.pad(x[:, :, :-1, -1:], [(0, 0)] * 2 + [(1, 0)] + [(0, 0)] * 2) for x in blocks)
    )
    before = jnp.arange(t) < (jnp.arange(n) * c)[:, None]
    every = Prefix(*(x[:, :, None] for x in a))
    to_start = jnp.exp(jnp.where(before[..., None], start.minus(every), -jnp.inf))
    rows = q.reshape(b, g, r, n, c, e)
    left = rows * jnp.exp(blocks.minus(start))[:, :, None]
    right = k[:, :, None] * to_start
    far = jnp.einsum(
        "bgrnce,bgnje->bgrncj", left.astype(q.dtype), right.astype(q.dtype), **precision
    )

    causal = jnp.tri(c, dtype=bool)[..., None]
    this, that = (Prefix(*(jnp.expand_dims(x, d) for x in blocks)) for d in (-2, -3))
    inside = jnp.exp(jnp.where(causal, this.minus(that), -jnp.inf))
    keyed = k.reshape(b, g, n, 1, c, e) * inside
    near = jnp.einsum("bgrnie,bgnije->bgrnij", rows.astype(keyed.dtype), keyed, precision="highest")
    # The block on the diagonal goes to its columns.
    own = jnp.arange(t) // c == jnp.arange(n)[:, None]
    near = jnp.where(own[:, None], jnp.tile(near, n), 0)
    return (far + near.astype(far.dtype)).reshape(b, g, r, t, t)
