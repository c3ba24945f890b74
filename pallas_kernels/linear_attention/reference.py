"""The specification of the op, token by token; see `pallas_kernels.linear_attention.api` for the maths."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def linear_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g v"],
    log_decay: Float[Array, "b t g"] | Float[Array, "b t g k"] | None,
    initial_state: Float[Array, "b g k w"] | None,
    segment_ids: Int[Array, "b t"] | None,
    normalize: bool,
    epsilon: float,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b g k w"]]:
    """y and the final state. Differentiable in every mode, to any order."""
    b, t, h, width = q.shape
    g = k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    values = v.astype(dtype)
    if normalize:
        values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
    a = jnp.zeros((b, t, g, 1), dtype) if log_decay is None else log_decay.astype(dtype)
    a = jnp.broadcast_to(a if a.ndim == 4 else a[..., None], k.shape)
    ids = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    if initial_state is None:
        initial_state = jnp.zeros((b, g, width, values.shape[-1]), dtype)

    def step(carry, token):
        state, current = carry
        q, k, v, a, new = token
        real = (new > 0)[:, None, None, None]
        state = jnp.where(real & (new != current)[:, None, None, None], 0, state)
        added = jnp.einsum("bgk,bgv->bgkv", k, v, precision="highest")
        state = jnp.where(real, state * jnp.exp(a)[..., None] + added, state)
        y = jnp.einsum("bgrk,bgkv->bgrv", q, state, precision="highest")
        return (state, jnp.where(new > 0, new, current)), y

    grouped = q.astype(dtype).reshape(b, t, g, h // g, width)
    tokens = (grouped, k.astype(dtype), values, a, ids)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    (state, _), y = jax.lax.scan(step, (initial_state, ids[:, 0]), tokens)
    y = jnp.moveaxis(y, 0, 1).reshape(b, t, h, -1)
    if normalize:
        den = jnp.where((ids > 0)[..., None, None], y[..., -1:], 1)
        y = y[..., :-1] / (den + epsilon)
    return y.astype(v.dtype), state
