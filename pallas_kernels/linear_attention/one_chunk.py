"""One chunk at once: weights between its tokens, features only for what comes before and after it.

Heads stand before tokens here; `chunked.py` turns them, a chunk at a time, where the copy is small.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.linear_attention import decay

LONGEST_TRANSPOSED = 512  # beyond it a transposed copy costs more memory traffic than it saves


class Map(NamedTuple):
    """A feature map phi by its two faces: the features, and phi(q) . phi(k) as a function of q . k and the width of q."""

    features: Callable[[Any], Any]
    weights: Callable[[Any, int], Any]


IDENTITY = Map(lambda x: x, lambda s, width: s)


class Where(NamedTuple):
    """Segments of a chunk; a state belongs to the segment `before`, and the next one to `after`."""

    ids: Int[Array, "b t"]
    before: Int[Array, " b"]
    after: Int[Array, " b"]


class Turned(NamedTuple):
    """The tokens of a chunk, heads before tokens; v is as wide as the sums, the products run in the dtype of q."""

    q: Float[Array, "b g r t f"]
    k: Float[Array, "b g t f"]
    v: Float[Array, "b g t v"]
    log_decay: Float[Array, "b g t *k"] | None


def read(
    tokens: Turned, state: Float[Array, "b g e v"] | None, where: Where | None, phi: Map
) -> Float[Array, "b g r t v"]:
    """What the queries of a chunk read: from the state, and from the tokens up to their own."""
    q, k, v, log_decay = tokens
    acc, narrow = v.dtype, q.dtype
    b, g, r, t, f = q.shape
    rows = q.reshape(b, g, r * t, f)
    visible = _visible(t, where)
    sums = None if log_decay is None else decay.prefix_sums(log_decay, axis=2)
    if sums is not None and sums.fine.ndim == 4:
        weights = decay.channel_weights(q, k, sums, dot_options(narrow, acc))
        weights = jnp.where(visible, weights, 0)
    else:
        s = _product(rows, jnp.swapaxes(k, -1, -2), acc).reshape(b, g, r, t, t)
        weights = phi.weights(s, f)
        if sums is None:
            weights = jnp.where(visible, weights, 0)
        else:
            weights = weights * decay.pair_factors(sums.over_queries(), visible)
    # The products run in the input dtype with wide accumulators; the weights are rounded once, after the polynomial.
    out = _product(weights.reshape(b, g, r * t, t).astype(narrow), v.astype(narrow), acc)
    out = out.reshape(b, g, r, t, -1)
    if state is None:
        return out
    phi_q = phi.features(rows.astype(acc))
    if sums is not None:
        reach = jnp.exp(sums.whole())
        reach = reach if reach.ndim == 4 else reach[..., None]
        phi_q = (phi_q.reshape(b, g, r, t, -1) * reach[:, :, None]).reshape(b, g, r * t, -1)
    from_state = _product(phi_q, state, acc).reshape(out.shape)
    if where is not None:
        goes_on = (where.ids == where.before[:, None])[:, None, None, :, None]
        from_state = jnp.where(goes_on, from_state, 0)
    return out + from_state


def update(
    tokens: Turned, state: Float[Array, "b g e v"] | None, where: Where | None, phi: Map
) -> Float[Array, "b g e v"]:
    """The state after a chunk: the sum of phi(k) v^T over its last segment, and the state before where that goes on."""
    q, k, v, log_decay = tokens
    acc, narrow = v.dtype, q.dtype
    if where is not None:
        in_last = (where.ids == where.after[:, None]) & (where.ids > 0)
        v = jnp.where(in_last[:, None, :, None], v, 0)
        if state is not None:
            kept = (where.after == where.before)[:, None, None, None]
            state = jnp.where(kept, state, 0)
    phi_k = phi.features(k.astype(acc))
    if log_decay is not None:
        sums = decay.prefix_sums(log_decay, axis=2)
        last = sums.at(-1, axis=2)
        left, whole = jnp.exp(last.minus(sums)), jnp.exp(last.whole())
        scalar = log_decay.ndim == 3
        phi_k = phi_k * (left[..., None] if scalar else left)
        if state is not None:
            state = state * (whole[..., None] if scalar else jnp.swapaxes(whole, 2, 3))
    added = _gram(phi_k.astype(narrow), v.astype(narrow), acc)
    return added if state is None else added + state


def dot_options(operand: Any, acc: Any) -> dict[str, Any]:
    """Float32 operands ask for full products: TPUs and Hopper would round them to bfloat16 and TF32."""
    wide = jnp.dtype(operand).itemsize >= 4
    return {"precision": "highest" if wide else "default", "preferred_element_type": acc}


def _visible(t: int, where: Where | None) -> Bool[Array, "..."]:
    index = jnp.arange(t)
    causal = index[:, None] >= index[None, :]
    if where is None:
        return causal
    ids = where.ids
    same = ids[:, :, None] == ids[:, None, :]
    return (causal & same & (ids[:, None, :] > 0))[:, None, None]


def _product(
    x: Float[Array, "b g i j"], y: Float[Array, "b g j k"], acc: Any
) -> Float[Array, "b g i k"]:
    """x y. Within a chunk its backward pass transposes x for real before it forms x^T g (see `_transposed`)."""
    if max(x.shape[-2:]) <= LONGEST_TRANSPOSED:
        return _chunk_product(x, y, acc)
    return jnp.matmul(x, y, **dot_options(x.dtype, acc))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _chunk_product(x, y, acc):
    return jnp.matmul(x, y, **dot_options(x.dtype, acc))


def _chunk_product_forward(x, y, acc):
    return _chunk_product(x, y, acc), (x, y)


def _chunk_product_backward(acc, operands, g):
    x, y = operands
    narrow = g.astype(x.dtype)
    dx = jnp.matmul(narrow, jnp.swapaxes(y, -1, -2), **dot_options(x.dtype, acc))
    dy = jnp.matmul(_transposed(x), narrow, **dot_options(x.dtype, acc))
    return dx.astype(x.dtype), dy.astype(y.dtype)


_chunk_product.defvjp(_chunk_product_forward, _chunk_product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gram(x, y, acc):
    """x^T y, the sum over tokens; its gradients are y g^T and x g, for which nothing long is transposed."""
    return jnp.matmul(_transposed(x), y, **dot_options(x.dtype, acc))


def _gram_forward(x, y, acc):
    return _gram(x, y, acc), (x, y)


def _gram_backward(acc, operands, g):
    x, y = operands
    narrow = g.astype(x.dtype)
    dx = jnp.matmul(y, jnp.swapaxes(narrow, -1, -2), **dot_options(x.dtype, acc))
    dy = jnp.matmul(x, narrow, **dot_options(x.dtype, acc))
    return dx.astype(x.dtype), dy.astype(y.dtype)


_gram.defvjp(_gram_forward, _gram_backward)


def _transposed(x: Float[Array, "b g j e"]) -> Float[Array, "b g e j"]:
    """x^T, really formed where that is cheap: for one chunk XLA's CPU backend takes 98 us for x^T y, and 5 + 57 in two steps."""
    transposed = jnp.swapaxes(x, -1, -2)
    if max(x.shape[-2:]) <= LONGEST_TRANSPOSED:
        return jax.lax.optimization_barrier(transposed)
    return transposed
