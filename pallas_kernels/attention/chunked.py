"""Linear memory: a scan over the pairs of blocks on and below the diagonal, with a running softmax.

Milakov & Gimelshein, arXiv 1805.02867; Rabe & Staats, arXiv 2112.05682; the backward pass from the saved log-normaliser is
that of Dao et al., arXiv 2205.14135. Forward walks the pairs row by row and carries one row block's running sums; backward
walks them column by column and carries one key block's gradients. Only q, k, v, the output and a number per row are kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import rows
from pallas_kernels.attention.rows import Keys, Queries, Rule

BLOCK = 128
LARGE_BLOCK, FEW_HEADS = 256, 8  # batch x heads up to this many: larger blocks cost less per weight


class Blocks(NamedTuple):
    """Sizes, fixed at trace time."""

    size: int  # rows, and keys, per block
    history: int  # keys before the one that the first query is aligned with


def attention(
    rule: Rule, queries: Queries, keys: Keys, block: int | None = None
) -> Float[Array, "n m t v"]:
    """As `quadratic.attention`."""
    n, m, t, _ = queries.q.shape
    s = keys.k.shape[1]
    block = block or (LARGE_BLOCK if n * m <= FEW_HEADS else BLOCK)
    blocks = Blocks(min(block, t), s - t)

    def padded(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % blocks.size)
        return jnp.pad(x, widths)

    # Keys past the end lie in every real query's future; queries past the end are cut off.
    q, k, v = padded(queries.q, 2), padded(keys.k, 1), padded(keys.v, 1)
    q_ids, k_ids = (None if x.ids is None else padded(x.ids, 1) for x in (queries, keys))
    bits = None if queries.bits is None else padded(queries.bits, 2)
    at = jnp.arange(max(q.shape[2] + blocks.history, k.shape[1]), dtype=jnp.int32)
    queries = Queries(q, at[blocks.history :][: q.shape[2]], q_ids, bits)
    return _attend(rule, blocks, queries, Keys(k, v, at[: k.shape[1]], k_ids))[:, :, :t]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rule: Rule, blocks: Blocks, queries: Queries, keys: Keys) -> Float[Array, "n m t v"]:
    return _forward(rule, blocks, queries, keys)[0]


class Running(NamedTuple):
    """The softmax of one block of rows over the keys so far."""

    out: Float[Array, "n r v"]  # sum of exp(score - top) v
    top: Float[Array, "n r 1"]
    total: Float[Array, "n r 1"]


def _forward(rule, blocks, queries, keys):
    n, m, t, _ = queries.q.shape
    dtype, acc = queries.q.dtype, rows.accumulator(queries.q.dtype)
    width, r = keys.v.shape[-1], m * blocks.size
    lowest = float(jnp.finfo(acc).min) / 2  # finite: rows that see nothing stay free of NaN

    def step(carry, pair):
        run, out, norms = carry
        i, j, first = pair
        row, col = _row_block(queries, i, blocks), _key_block(keys, j, blocks)
        run = Running(*(jnp.where(first, x, y) for x, y in zip((0, lowest, 0), run)))
        s = rows.scores(rule, row, col)
        top = jnp.maximum(run.top, jnp.max(s, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(s - top), jnp.exp(run.top - top)
        kept = rows.dropped(rule, row, col, weights).astype(dtype)
        update = jnp.einsum("nrs,nsv->nrv", kept, col.v, **rows.dot(dtype))
        total = run.total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        run = Running(run.out * shrink + update, top, total)
        # Written after every pair of the row; the last one stays.
        safe = jnp.where(total == 0, 1, total)
        out = _write(out, (run.out / safe).reshape(n, m, -1, width), i, blocks)
        norms = _write(norms, (top + jnp.log(safe)).reshape(n, m, -1, 1), i, blocks)
        return (run, out, norms), None

    zeros = lambda *shape: jnp.zeros(shape, acc)
    run = Running(zeros(n, r, width), zeros(n, r, 1), zeros(n, r, 1))
    carry = (run, jnp.zeros((n, m, t, width), dtype), zeros(n, m, t, 1))
    pairs = _visible_pairs(t, keys.k.shape[1], blocks, by_key=False)
    (_, out, norms), _ = jax.lax.scan(step, carry, pairs)
    return out, (queries, keys, out, norms)


def _backward(rule, blocks, saved, g):
    queries, keys, out, norms = saved
    n, _, t, _ = queries.q.shape
    acc = rows.accumulator(queries.q.dtype)
    means = jnp.sum(g.astype(acc) * out.astype(acc), axis=-1, keepdims=True)

    def step(carry, pair):
        dq, dk, dv, dk_block, dv_block = carry
        i, j, first = pair
        row, col = _row_block(queries, i, blocks), _key_block(keys, j, blocks)
        of_row = lambda x: _read(x, i, blocks, 2)
        flat = lambda x: of_row(x).reshape(n, -1, 1)
        weights = jnp.exp(rows.scores(rule, row, col) - flat(norms))
        to_q, to_k, to_v = rows.gradients(rule, row, col, of_row(g), weights, flat(means))
        dk_block = jnp.where(first, 0, dk_block) + to_k
        dv_block = jnp.where(first, 0, dv_block) + to_v
        dq = _write(dq, of_row(dq) + to_q, i, blocks)
        dk, dv = _write(dk, dk_block, j, blocks, 1), _write(dv, dv_block, j, blocks, 1)
        return (dq, dk, dv, dk_block, dv_block), None

    zeros = lambda *shape: jnp.zeros(shape, acc)
    arrays = [zeros(*x.shape) for x in (queries.q, keys.k, keys.v)]
    running = [zeros(n, blocks.size, x.shape[-1]) for x in (keys.k, keys.v)]
    pairs = _visible_pairs(t, keys.k.shape[1], blocks, by_key=True)
    (dq, dk, dv, *_), _ = jax.lax.scan(step, (*arrays, *running), pairs)
    return rows.cotangents(queries, keys, dq, dk, dv)


_attend.defvjp(_forward, _backward)


def _visible_pairs(t: int, s: int, blocks: Blocks, by_key: bool) -> Int[Array, "pairs 3"]:
    """(row block, key block, whether it is the first of its row, or with by_key of its column) of all pairs with a key that
    some row sees, in order."""
    size = blocks.size
    pairs = [
        (i, j)
        for i in range(t // size)
        for j in range(s // size)
        if j * size <= blocks.history + (i + 1) * size - 1
    ]
    axis = int(by_key)
    pairs.sort(key=lambda pair: (pair[axis], pair[1 - axis]))
    line = np.array([pair[axis] for pair in pairs])
    first = np.diff(line, prepend=-1) != 0
    return jnp.asarray(np.column_stack([pairs, first]), jnp.int32)


def _read(x, i, blocks, axis):
    return jax.lax.dynamic_slice_in_dim(x, i * blocks.size, blocks.size, axis)


def _write(x, block, i, blocks, axis=2):
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), i * blocks.size, axis)


def _row_block(queries, i, blocks):
    read = lambda x, axis: None if x is None else _read(x, i, blocks, axis)
    q, at, ids, bits = queries
    return Queries(read(q, 2), read(at, 0), read(ids, 1), read(bits, 2))


def _key_block(keys, j, blocks):
    read = lambda x, axis: None if x is None else _read(x, j, blocks, axis)
    k, v, at, ids = keys
    return Keys(read(k, 1), read(v, 1), read(at, 0), read(ids, 1))
