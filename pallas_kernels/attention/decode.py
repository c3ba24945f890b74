"""One query per sequence: a pass over the keys and a pass over the values, where they lie.

A GEMM with one row would first copy keys and values to [b, g, s, k]; multiply and reduce reads them once in place.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.attention.dropout import kept


def attention(
    q: Float[Array, "b 1 h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    q_ids: Int[Array, "b 1"] | None,
    k_ids: Int[Array, "b s"] | None,
    bits: UInt32[Array, "b 1 h 2"] | None,
    *,
    scale: float,
    rate: float = 0.0,
    window: int | None = None,
) -> Float[Array, "b 1 h v"]:
    """Softmax over the keys in float32 or wider."""
    b, _, h, width = q.shape
    s, g = k.shape[1:3]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    rows = q.reshape(b, 1, g, h // g, width).astype(acc) * scale
    scores = jnp.sum(rows * k[:, :, :, None].astype(acc), axis=-1)  # [b, s, g, h/g]
    distance = jnp.arange(s - 1, -1, -1)
    seen = jnp.ones((1, s), bool) if window is None else (distance < window)[None]
    if q_ids is not None and k_ids is not None:
        seen = seen & (q_ids == k_ids) & (k_ids > 0)
    seen = seen[:, :, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - top, 0)), 0)
    total = jnp.sum(weights, axis=1)
    if bits is not None:
        keep = kept(bits[:, 0, :, None], distance[None], rate)[:, :, 0]  # [b, h, s]
        keep = jnp.swapaxes(keep, 1, 2).reshape(weights.shape)
        weights = jnp.where(keep, weights / (1 - rate), 0)
    out = jnp.sum(weights[..., None] * v[:, :, :, None].astype(acc), axis=1)  # [b, g, h/g, v]
    out = out / jnp.where(total == 0, 1, total)[..., None]
    return out.reshape(b, 1, h, -1).astype(q.dtype)
