"""One query per sequence: a pass over the keys and a pass over the values, where they lie.

A GEMM with one row would first copy keys and values to [b, g, s, k], and clearing masked slots would copy them again;
multiply and reduce reads them once, in place (measured on a CPU, float32: 14 GB/s against 5).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from pallas_kernels.attention.dropout import kept, row_bits


def attend_to_cache(
    q: Float[Array, "b 1 h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    visible: Bool[Array, "b s"],
    *,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "b 1 h v"]:
    """The op for one query and a cache of keys and values, of which it sees the `visible` slots; 0 where it sees none.

    Unlike in `attention`, hidden slots must hold finite numbers (caches start as zeros): nothing is cleared, so nothing is
    copied. The cache may have another dtype than q.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    bits = row_bits(dropout_key, q.shape[:3]) if dropout_rate and dropout_key is not None else None
    return one_row(q, k, v, visible, bits, scale=scale, rate=dropout_rate)


def one_row(
    q: Float[Array, "b 1 h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    visible: Bool[Array, "b s"],
    bits: UInt32[Array, "b 1 h 2"] | None,
    *,
    scale: float,
    rate: float,
) -> Float[Array, "b 1 h v"]:
    """Softmax over the visible slots in float32 or wider; hidden slots hold finite numbers."""
    b, _, h, width = q.shape
    s, g = k.shape[1:3]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    row = q.reshape(b, 1, g, h // g, width).astype(acc) * scale
    scores = jnp.sum(row * k[:, :, :, None].astype(acc), axis=-1)  # [b, s, g, h/g]
    scores = jnp.where(visible[:, :, None, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(weights, axis=1)
    if bits is not None:
        distance = jnp.arange(s - 1, -1, -1)[None]
        keep = kept(bits[:, 0, :, None], distance, rate)  # [b, h, 1, s]
        keep = jnp.moveaxis(keep[:, :, 0], 2, 1).reshape(weights.shape)
        weights = jnp.where(keep, weights / (1 - rate), 0)
    out = jnp.sum(weights[..., None] * v[:, :, :, None].astype(acc), axis=1)  # [b, g, h/g, v]
    out = out / jnp.where(total == 0, 1, total)[..., None]
    return out.reshape(b, 1, h, -1).astype(q.dtype)
