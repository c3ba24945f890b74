"""The specification of the op: one masked softmax over all keys; see `pallas_kernels.attention.api` for the maths."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.attention.dropout import kept


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    q_ids: Int[Array, "b t"] | None,
    k_ids: Int[Array, "b s"] | None,
    bits: UInt32[Array, "b t h 2"] | None,
    *,
    scale: float,
    rate: float = 0.0,
    window: int | None = None,
) -> Float[Array, "b t h v"]:
    """Weights [b, h, t, s] in float32 or wider, one einsum each way. Padded slots of q, k and v must hold zeros."""
    (t, h), (s, g) = q.shape[1:3], k.shape[1:3]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (jnp.repeat(x.astype(acc), h // g, axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q.astype(acc), k, precision="highest") * scale
    distance = jnp.arange(t)[:, None] + (s - t) - jnp.arange(s)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if q_ids is not None and k_ids is not None:
        same = (q_ids[:, :, None] == k_ids[:, None, :]) & (k_ids[:, None, :] > 0)
        visible = (visible & same)[:, None]
    top = jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    if bits is not None:
        keep = kept(jnp.moveaxis(bits, 2, 1), distance, rate)
        weights = jnp.where(keep, weights / (1 - rate), 0)
    return jnp.einsum("bhts,bshv->bthv", weights, v, precision="highest").astype(q.dtype)
