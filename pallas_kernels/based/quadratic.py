"""One chunk at once: the kernel 1 + s + s^2/2 between its tokens, the features only for what comes before and after it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.based.feature_map import taylor_features

LONGEST_TRANSPOSED = 512  # beyond it a transposed copy costs more memory traffic than it saves


def whole(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    state: Float[Array, "b g e v1"] | None,
    segment_ids: Int[Array, "b t"] | None,
) -> tuple[Float[Array, "b t h v1"], Float[Array, "b g e v1"]]:
    """Numerators and, in the last column, denominators of every token; and the final state."""
    current = None if segment_ids is None else segment_ids[:, 0]
    real = None if segment_ids is None else segment_ids > 0
    return one_chunk(q, k, v, real, segment_ids, state, current)[:2]


def one_chunk(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    real: Bool[Array, "b t"] | None,
    segment_ids: Int[Array, "b t"] | None,
    state: Float[Array, "b g e v1"] | None,
    current: Int[Array, " b"] | None,
) -> tuple[Float[Array, "b t h v1"], Float[Array, "b g e v1"], Int[Array, " b"] | None]:
    """Outputs of the tokens of one chunk, and the state and segment id after it.

    `state` belongs to segment `current`. Where not `real`, a token adds nothing to any sum.
    """
    b, t, h, f = q.shape
    g = k.shape[2]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    ones = jnp.ones(v.shape[:-1] + (1,), acc)
    v1 = jnp.concatenate([v.astype(acc), ones], axis=-1)
    if real is not None:
        v1 = jnp.where(real[..., None, None], v1, 0)
    grouped = jnp.moveaxis(q.reshape(b, t, g, h // g, f), 1, 3)
    out, state, current = _one_chunk(
        grouped, jnp.moveaxis(k, 2, 1), jnp.moveaxis(v1, 2, 1), segment_ids, state, current
    )
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, -1), state, current


def _one_chunk(
    q: Float[Array, "b g r t f"],
    k: Float[Array, "b g t f"],
    v1: Float[Array, "b g t v1"],
    segment_ids: Int[Array, "b t"] | None,
    state: Float[Array, "b g e v1"] | None,
    current: Int[Array, " b"] | None,
) -> tuple[Float[Array, "b g r t v1"], Float[Array, "b g e v1"], Int[Array, " b"] | None]:
    """`one_chunk` with heads before tokens, and the values with their column of ones."""
    acc = v1.dtype
    b, g, r, t, f = q.shape
    rows = q.reshape(b, g, r * t, f)
    s = _product(rows, jnp.swapaxes(k, -1, -2), acc) * f**-0.5
    s = s.reshape(b, g, r, t, t)
    weights = jnp.where(_visible(t, segment_ids), 1 + s * (1 + 0.5 * s), 0)
    # The products run in the input dtype with wide accumulators; the weights are rounded once, after the polynomial.
    narrow = q.dtype
    out = _product(weights.reshape(b, g, r * t, t).astype(narrow), v1.astype(narrow), acc)
    out = out.reshape(b, g, r, t, -1)

    remembered, keep = v1, None
    after = current
    if segment_ids is not None and current is not None:
        after = jnp.maximum(current, jnp.max(segment_ids, axis=1))
        keep = (after == current)[:, None, None, None]
        in_last = (segment_ids == after[:, None]) & (segment_ids > 0)
        remembered = jnp.where(in_last[:, None, :, None], v1, 0)
    if state is not None:
        from_state = _product(taylor_features(rows.astype(acc)), state, acc).reshape(out.shape)
        if segment_ids is not None and current is not None:
            from_state = jnp.where(
                (segment_ids == current[:, None])[:, None, None, :, None], from_state, 0
            )
        out = out + from_state
    phi_k = taylor_features(k.astype(acc))
    update = _product(_transposed(phi_k.astype(narrow)), remembered.astype(narrow), acc)
    if state is not None:
        update = update + (state if keep is None else jnp.where(keep, state, 0))
    return out, update, after


def _product(
    x: Float[Array, "b g i j"], y: Float[Array, "b g j k"], acc: Any
) -> Float[Array, "b g i k"]:
    """x y. Within a chunk its backward pass transposes x for real before it forms x^T g (see `_transposed`)."""
    if max(x.shape[-2:]) <= LONGEST_TRANSPOSED:
        return _chunk_product(x, y, acc)
    return jnp.matmul(x, y, **_dot(x.dtype, acc))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _chunk_product(x, y, acc):
    return jnp.matmul(x, y, **_dot(x.dtype, acc))


def _chunk_product_forward(x, y, acc):
    return _chunk_product(x, y, acc), (x, y)


def _chunk_product_backward(acc, operands, g):
    x, y = operands
    narrow = g.astype(x.dtype)
    dx = jnp.matmul(narrow, jnp.swapaxes(y, -1, -2), **_dot(x.dtype, acc))
    dy = jnp.matmul(_transposed(x), narrow, **_dot(x.dtype, acc))
    return dx.astype(x.dtype), dy.astype(y.dtype)


_chunk_product.defvjp(_chunk_product_forward, _chunk_product_backward)


def _transposed(x: Float[Array, "b g j e"]) -> Float[Array, "b g e j"]:
    """x^T, really formed where that is cheap: for one chunk XLA's CPU backend takes 98 us for x^T y, and 5 + 57 in two steps."""
    transposed = jnp.swapaxes(x, -1, -2)
    if max(x.shape[-2:]) <= LONGEST_TRANSPOSED:
        return jax.lax.optimization_barrier(transposed)
    return transposed


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
