"""One block of query rows against one run of keys: the piece that the quadratic, chunked and banded forms are made of.

Heads are folded away first: n = batch x key/value heads, and the m query heads of a group are rows of the same matrix, so
that every product is one batched GEMM without a transposed copy of the weights.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.attention.dropout import kept


class Rule(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    rate: float = 0.0  # dropout
    window: int | None = None  # keys that a query sees, itself included


class Queries(NamedTuple):
    """Query rows with what masks them."""

    q: Float[Array, "n m t k"]
    at: Int[Array, " t"]  # index of the key that a row is aligned with
    ids: Int[Array, "n t"] | None
    bits: UInt32[Array, "n m t 2"] | None  # of dropout

    def rows(self, start: int, stop: int) -> "Queries":
        ids = None if self.ids is None else self.ids[:, start:stop]
        bits = None if self.bits is None else self.bits[:, :, start:stop]
        return Queries(self.q[:, :, start:stop], self.at[start:stop], ids, bits)


class Keys(NamedTuple):
    """A run of keys and their values."""

    k: Float[Array, "n s k"]
    v: Float[Array, "n s v"]
    at: Int[Array, " s"]
    ids: Int[Array, "n s"] | None

    def first(self, stop: int) -> "Keys":
        ids = None if self.ids is None else self.ids[:, :stop]
        return Keys(self.k[:, :stop], self.v[:, :stop], self.at[:stop], ids)


def fold(q, k, v, q_ids, k_ids, bits) -> tuple[Queries, Keys]:
    """The arguments of the op ([b, t, h, k], ...) with heads folded away."""
    b, t, h, width = q.shape
    s, g = k.shape[1:3]

    def folded(x):  # [b, t, h, ...] -> [b g, h/g, t, ...]; without a copy for one head
        x = x.reshape(b, t, g, h // g, x.shape[-1])
        return jnp.moveaxis(x, 1, 3).reshape(b * g, h // g, t, x.shape[-1])

    def keys(x):
        return jnp.swapaxes(x, 1, 2).reshape(b * g, s, x.shape[-1])

    def repeated(ids):
        return ids if ids is None or g == 1 else jnp.repeat(ids, g, axis=0)

    at = jnp.arange(s, dtype=jnp.int32)
    queries = Queries(
        folded(q), at[s - t :], repeated(q_ids), None if bits is None else folded(bits)
    )
    return queries, Keys(keys(k), keys(v), at, repeated(k_ids))


def unfold(out: Float[Array, "n m t v"], b: int) -> Float[Array, "b t h v"]:
    """Heads back in their place."""
    n, m, t, width = out.shape
    out = jnp.moveaxis(out.reshape(b, n // b, m, t, width), 3, 1)
    return out.reshape(b, t, n // b * m, width)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(rule: Rule, queries: Queries, keys: Keys) -> Float[Array, "n m t v"]:
    """softmax(scale q k^T + mask) v; rows that see no key give 0. The backward pass reads the saved weights."""
    return _forward(rule, queries, keys)[0]


def _forward(rule, queries, keys):
    weights = softmax_weights(rule, queries, keys)
    dropped = _dropped(rule, queries, keys, weights)
    out = jnp.einsum("nrs,nsv->nrv", dropped, keys.v, **dot(keys.v.dtype))
    shape = queries.q.shape[:3] + keys.v.shape[-1:]
    return out.reshape(shape).astype(queries.q.dtype), (queries, keys, weights)


def _backward(rule, saved, g):
    queries, keys, weights = saved
    n, m, t, width = queries.q.shape
    acc, dtype = _acc(queries.q.dtype), queries.q.dtype
    product = dot(dtype)
    q = queries.q.reshape(n, m * t, width)
    g = g.reshape(n, m * t, -1).astype(dtype)
    # The weights are never the transposed operand: XLA on a CPU would copy them. Small operands and results are.
    dropped = _dropped(rule, queries, keys, weights)
    dv = jnp.swapaxes(jnp.einsum("nrv,nrs->nvs", g, dropped, **product), 1, 2)
    dp = jnp.einsum("nrv,nsv->nrs", g, keys.v, **product)
    dp = _dropped(rule, queries, keys, dp)
    wide = weights.astype(acc)
    ds = wide * (dp - jnp.sum(wide * dp, axis=-1, keepdims=True)) * rule.scale
    ds = ds.astype(dtype)
    dq = jnp.einsum("nrs,nsk->nrk", ds, keys.k, **product)
    dk = jnp.swapaxes(jnp.einsum("nrk,nrs->nks", q, ds, **product), 1, 2)
    dq = dq.reshape(queries.q.shape).astype(dtype)
    return (
        Queries(dq, None, None, None),
        Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None, None),
    )


attend.defvjp(_forward, _backward)


def softmax_weights(rule: Rule, queries: Queries, keys: Keys) -> Float[Array, "n r s"]:
    """The weights before dropout, [n, m t, s], normalised in float32 or wider, then of q's dtype."""
    n, m, t, width = queries.q.shape
    q = queries.q.reshape(n, m * t, width)
    scores = jnp.einsum("nrk,nsk->nrs", q, keys.k, **dot(q.dtype)) * rule.scale
    scores = jnp.where(visible(rule, queries, keys), scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if queries.ids is not None:  # a padded row sees nothing
        top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if queries.ids is not None:
        total = jnp.where(total == 0, 1, total)
    return (weights / total).astype(q.dtype)


def visible(rule: Rule, queries: Queries, keys: Keys) -> Bool[Array, "... r s"]:
    """Which key each row sees, [m t, s] or with ids [n, m t, s]."""
    m = queries.q.shape[1]
    distance = queries.at[:, None] - keys.at
    seen = distance >= 0
    if rule.window is not None:
        seen &= distance < rule.window
    if queries.ids is not None and keys.ids is not None:
        same = queries.ids[:, :, None] == keys.ids[:, None, :]
        seen = seen & same & (keys.ids[:, None, :] > 0)
    return jnp.concatenate([seen] * m, axis=-2) if m > 1 else seen


def _dropped(rule, queries, keys, x):
    """x [n, m t, s] where dropout keeps it, scaled up, and 0 elsewhere."""
    if queries.bits is None:
        return x
    keep = kept(queries.bits, queries.at[:, None] - keys.at, rule.rate)
    return jnp.where(keep.reshape(x.shape), x * (1 / (1 - rule.rate)), 0).astype(x.dtype)


def _acc(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def dot(dtype) -> dict:
    """How products of this dtype run: float32 in full (TPUs and Hopper would round it), sums in float32 or wider."""
    wide = jnp.dtype(dtype).itemsize >= 4
    return {"precision": "highest" if wide else "default", "preferred_element_type": _acc(dtype)}
