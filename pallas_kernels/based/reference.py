"""The specification of the op, token by token; see `pallas_kernels.based.api` for the maths."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.based.feature_map import taylor_features


def based(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    initial_state: Float[Array, "b g e v1"] | None,
    segment_ids: Int[Array, "b t"] | None,
    normalize: bool,
    epsilon: float,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b g e v1"]]:
    """y and the final state; what y holds at padding does not matter. Differentiable in every mode, to any order."""
    heads, groups = q.shape[2], k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    phi_q, phi_k = (taylor_features(x.astype(dtype)) for x in (q, k))
    phi_q = phi_q.reshape(phi_q.shape[:2] + (groups, heads // groups, -1))
    v1 = jnp.concatenate([v.astype(dtype), jnp.ones(v.shape[:-1] + (1,), dtype)], axis=-1)
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    if initial_state is None:
        initial_state = jnp.zeros(phi_k[:, 0].shape + v1.shape[-1:], dtype)

    def step(carry, token):
        state, current = carry
        phi_q, phi_k, v1, new = token
        reset = (new > 0) & (new != current)
        state = jnp.where(reset[:, None, None, None], 0, state)
        update = jnp.einsum("bge,bgv->bgev", phi_k, v1, precision="highest")
        state = jnp.where((new > 0)[:, None, None, None], state + update, state)
        out = jnp.einsum("bgre,bgev->bgrv", phi_q, state, precision="highest")
        return (state, jnp.where(new > 0, new, current)), out

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (phi_q, phi_k, v1, ids))
    (state, _), out = jax.lax.scan(step, (initial_state, ids[:, 0]), tokens)
    out = jnp.moveaxis(out, 0, 1).reshape(q.shape[:3] + v1.shape[-1:])
    y, den = out[..., :-1], out[..., -1:]
    if normalize:
        den = jnp.where((ids > 0)[..., None, None], den, 1)
        y = y / (den + jnp.asarray(epsilon, dtype))
    return y.astype(v.dtype), state
