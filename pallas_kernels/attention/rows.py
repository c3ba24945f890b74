"""One block of query rows against one run of keys: the piece that the quadratic, chunked and banded forms are made of.

Heads are folded away first: n = batch x key/value heads, and the m query heads of a group are rows of the same matrix, so
that every product is one batched GEMM without a transposed copy of the weights.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

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

    def between(self, start: int, stop: int) -> "Keys":
        ids = None if self.ids is None else self.ids[:, start:stop]
        return Keys(self.k[:, start:stop], self.v[:, start:stop], self.at[start:stop], ids)


def fold(q, k, v, q_ids, k_ids, bits) -> tuple[Queries, Keys]:
    """The arguments of the op ([b, t, h, k], ...) with heads folded away."""
    b, t, h, _ = q.shape
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
    dtype = queries.q.dtype
    s = scores(rule, queries, keys)
    top = jnp.max(s, axis=-1, keepdims=True)
    if queries.ids is not None:  # a row of padding sees nothing
        top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(s - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if queries.ids is not None:
        total = jnp.where(total == 0, 1, total)
    weights = (weights / total).astype(dtype)
    kept_weights = dropped(rule, queries, keys, weights)
    out = jnp.einsum("nrs,nsv->nrv", kept_weights, keys.v, **dot(dtype)).astype(dtype)
    return out.reshape(*queries.q.shape[:3], -1), (queries, keys, weights)


def _backward(rule, saved, g):
    queries, keys, weights = saved
    dq, dk, dv = gradients(rule, queries, keys, g, weights, None)
    return cotangents(queries, keys, dq, dk, dv)


attend.defvjp(_forward, _backward)


def gradients(
    rule: Rule,
    queries: Queries,
    keys: Keys,
    g: Float[Array, "n m t v"],
    p: Float[Array, "n r s"],
    mean: Float[Array, "n r 1"] | None,
) -> tuple[Float[Array, "n m t k"], Float[Array, "n s k"], Float[Array, "n s v"]]:
    """Gradients of q, k and v in float32 or wider.

    g is the output's, p the weights before dropout, dp their gradient; mean_i = sum_j p_ij dp_ij over all keys that row i
    sees, None where those are all here.
    """
    n, m, t, width = queries.q.shape
    dtype = queries.q.dtype
    product = dot(dtype)
    q = queries.q.reshape(n, m * t, width)
    g = g.reshape(n, m * t, -1).astype(dtype)
    # The weights are never the transposed operand, which XLA on a CPU would copy: small operands and results are.
    dv = jnp.einsum("nrv,nrs->nvs", g, dropped(rule, queries, keys, p).astype(dtype), **product)
    dp = dropped(rule, queries, keys, jnp.einsum("nrv,nsv->nrs", g, keys.v, **product))
    p = p.astype(accumulator(dtype))
    if mean is None:
        mean = jnp.sum(p * dp, axis=-1, keepdims=True)
    ds = (p * (dp - mean) * rule.scale).astype(dtype)
    dq = jnp.einsum("nrs,nsk->nrk", ds, keys.k, **product).reshape(queries.q.shape)
    dk = jnp.einsum("nrk,nrs->nks", q, ds, **product)
    return dq, jnp.swapaxes(dk, 1, 2), jnp.swapaxes(dv, 1, 2)


def cotangents(queries: Queries, keys: Keys, dq, dk, dv) -> tuple[Queries, Keys]:
    """What a backward pass returns: of the inputs' types, nothing for indices, ids and bits."""
    return (
        Queries(dq.astype(queries.q.dtype), None, None, None),
        Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None, None),
    )


def scores(rule: Rule, queries: Queries, keys: Keys) -> Float[Array, "n r s"]:
    """scale q k^T, [n, m t, s], in float32 or wider, -inf where a row does not see a key."""
    n, m, t, width = queries.q.shape
    q = queries.q.reshape(n, m * t, width)
    s = jnp.einsum("nrk,nsk->nrs", q, keys.k, **dot(q.dtype)) * rule.scale
    distance = queries.at[:, None] - keys.at
    seen = distance >= 0
    if rule.window is not None:
        seen &= distance < rule.window
    if queries.ids is not None and keys.ids is not None:
        same = queries.ids[:, :, None] == keys.ids[:, None, :]
        seen = seen & same & (keys.ids[:, None, :] > 0)
    if m > 1:
        seen = jnp.concatenate([seen] * m, axis=-2)
    return jnp.where(seen, s, -jnp.inf)


def dropped(
    rule: Rule, queries: Queries, keys: Keys, x: Float[Array, "n r s"]
) -> Float[Array, "n r s"]:
    """x where dropout keeps it, scaled up, and 0 elsewhere."""
    if queries.bits is None:
        return x
    keep = kept(queries.bits, queries.at[:, None] - keys.at, rule.rate).reshape(x.shape)
    return jnp.where(keep, x * (1 / (1 - rule.rate)), 0).astype(x.dtype)


def accumulator(dtype):
    """The type of sums, softmax and normalisers."""
    return jnp.promote_types(dtype, jnp.float32)


def dot(dtype) -> dict:
    """How products of this dtype run: float32 in full (TPUs and Hopper would round it), sums in float32 or wider."""
    wide = jnp.dtype(dtype).itemsize >= 4
    return {
        "precision": "highest" if wide else "default",
        "preferred_element_type": accumulator(dtype),
    }
