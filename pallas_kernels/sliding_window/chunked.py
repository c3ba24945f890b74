"""The band: blocks of queries, each against its own keys and the window - 1 before them. Time and memory O(t w)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.inputs import Inputs
from pallas_kernels.attention.rows import Keys, Queries, Rule, attend, fold, unfold

BLOCK = 64
WEIGHTS = 2**24  # weights computed at once; more run one group of blocks after the other


def attention(
    inputs: Inputs, rate: float, window: int, block: int | None = None
) -> Float[Array, "b t h v"]:
    """Blocks become batch rows of one `attend`; beyond WEIGHTS, a scan over groups of blocks that recomputes in backward."""
    b, t = inputs.q.shape[:2]
    *arrays, scale = inputs.last_keys(t + window - 1)
    queries, keys = fold(*arrays)
    block = min(block or max(BLOCK, window), t)
    n, m = queries.q.shape[:2]
    count = -(-t // block)
    group = min(count, max(1, WEIGHTS // (n * m * block * (block + window - 1))))
    count = -(-count // group) * group
    bands = _bands(queries, keys, block, count, window)
    run = lambda bands: _attend_bands(Rule(scale, rate, window), bands, block, window)
    if group == count:
        out = run(bands)
    else:
        split = lambda x: x.reshape(count // group, group, *x.shape[1:])
        out = jax.lax.map(jax.checkpoint(run), jax.tree.map(split, bands))
        out = out.reshape(count, *out.shape[2:])
    out = jnp.moveaxis(out, 0, 2)  # [count, n, m, block, v] -> [n, m, count, block, v]
    return unfold(out.reshape(n, m, count * block, -1)[:, :, :t], b)


def _bands(queries: Queries, keys: Keys, block: int, count: int, window: int):
    """Queries, keys, values, ids and dropout bits per block, blocks first."""
    t, s = queries.q.shape[2], keys.k.shape[1]
    back = window - 1
    before, after = back - (s - t), count * block - t

    def rows(x, axis):
        x = jnp.pad(x, [(0, after if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(x.shape[:axis] + (count, block) + x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def slabs(x):  # [n, s, ...] -> [count, n, back + block, ...]
        x = jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
        own = jnp.moveaxis(x[:, back:].reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)
        parts = []
        for start in range(
            0, back, block
        ):  # the keys before the block, a stride of blocks at a time
            width = min(block, back - start)
            part = x[:, start : start + count * block].reshape(
                own.shape[1], count, block, *x.shape[2:]
            )
            parts.append(jnp.moveaxis(part[:, :, :width], 1, 0))
        return jnp.concatenate([*parts, own], axis=2)

    # Keys before the first one do not exist; they carry id 0, queries without ids carry id 1.
    n = keys.k.shape[0]
    ids = (queries.ids, keys.ids)
    if queries.ids is None and before > 0:
        ids = (jnp.ones((n, t), jnp.int32), jnp.ones((n, s), jnp.int32))
    q_ids, k_ids = (None, None) if ids[0] is None else (rows(ids[0], 1), slabs(ids[1]))
    bits = None if queries.bits is None else rows(queries.bits, 2)
    return rows(queries.q, 2), slabs(keys.k), slabs(keys.v), q_ids, k_ids, bits


def _attend_bands(rule: Rule, bands, block: int, window: int):
    """One `attend` for all blocks given: the mask of a band is the same in each."""
    count, n = bands[0].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(count * n, *x.shape[2:]), bands)
    q, k, v, q_ids, k_ids, bits = flat
    at = jnp.arange(block + window - 1, dtype=jnp.int32)
    out = attend(rule, Queries(q, at[window - 1 :], q_ids, bits), Keys(k, v, at, k_ids))
    return out.reshape(count, n, *out.shape[1:])
