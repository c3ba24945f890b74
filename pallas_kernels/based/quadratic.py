"""One chunk at once: the kernel 1 + s + s^2/2 between its tokens, the features only for what comes before and after it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.based.feature_map import taylor_features


def one_chunk(
    q: Float[Array, "b g r t f"],
    k: Float[Array, "b g t f"],
    v1: Float[Array, "b g t v1"],
    state: Float[Array, "b g e v1"] | None,
    segment_ids: Int[Array, "b t"] | None,
    current: Int[Array, " b"] | None,
) -> tuple[Float[Array, "b g r t v1"], Float[Array, "b g e v1"], Int[Array, " b"] | None]:
    """Outputs of the tokens of one chunk, and the state and segment id after it.

    `state` belongs to segment `current`. v1 holds the values with a column of ones; rows of zeros in it are padding.
    """
    acc = v1.dtype
    b, g, r, t, f = q.shape
    rows = q.reshape(b, g, r * t, f)
    s = jnp.einsum("bgif,bgjf->bgij", rows, k, **_dot(q.dtype, acc)) * f**-0.5
    s = s.reshape(b, g, r, t, t)
    weights = jnp.where(_visible(t, segment_ids), 1 + s * (1 + 0.5 * s), 0)
    # The dot products run in the input dtype with wide accumulators; the weights are rounded once, after the polynomial.
    narrow = q.dtype
    out = jnp.einsum(
        "bgij,bgjv->bgiv",
        weights.reshape(b, g, r * t, t).astype(narrow),
        v1.astype(narrow),
        **_dot(narrow, acc),
    ).reshape(b, g, r, t, -1)

    remembered, keep = v1, None
    after = current
    if segment_ids is not None and current is not None:
        after = jnp.maximum(current, jnp.max(segment_ids, axis=1))
        keep = (after == current)[:, None, None, None]
        in_last = (segment_ids == after[:, None]) & (segment_ids > 0)
        remembered = jnp.where(in_last[:, None, :, None], v1, 0)
    if state is not None:
        from_state = jnp.einsum(
            "bgie,bgev->bgiv", taylor_features(rows.astype(acc)), state, **_dot(acc, acc)
        ).reshape(out.shape)
        if segment_ids is not None and current is not None:
            from_state = jnp.where(
                (segment_ids == current[:, None])[:, None, None, :, None], from_state, 0
            )
        out = out + from_state
    phi_k = taylor_features(k.astype(acc))
    update = jnp.einsum(
        "bgje,bgjv->bgev", phi_k.astype(narrow), remembered.astype(narrow), **_dot(narrow, acc)
    )
    if state is not None:
        update = update + (state if keep is None else jnp.where(keep, state, 0))
    return out, update, after


def _visible(t: int, segment_ids: Int[Array, "b t"] | None):
    index = jnp.arange(t)
    causal = index[:, None] >= index[None, :]
    if segment_ids is None:
        return causal
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (causal & same & (segment_ids[:, None, :] > 0))[:, None, None]


def _dot(operand, acc) -> dict:
    """Float32 operands ask for full products: TPUs and Hopper would round them to bfloat16 and TF32."""
    wide = jnp.dtype(operand).itemsize >= 4
    return {"precision": "highest" if wide else "default", "preferred_element_type": acc}
