"""Memory linear in the length: blocks of query rows, each against the keys up to its own end.

The causal half that nobody sees is skipped by at most SUPERBLOCKS static pieces; inside a piece, a scan runs over blocks of
BLOCK rows against the keys of the whole piece. A piece of work is recomputed in the backward pass, so only q, k, v live on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.rows import Keys, Queries, Rule, attend

BLOCK = 128
SUPERBLOCKS = 8
KEEP_WEIGHTS = 512  # up to this many rows the weights are kept for the backward pass


def attention(
    rule: Rule, queries: Queries, keys: Keys, block: int | None = None
) -> Float[Array, "n m t v"]:
    """As `quadratic.attention`."""
    t, s = queries.q.shape[2], keys.k.shape[1]
    block = block or BLOCK
    blocks = -(-t // block)
    size = block * -(-blocks // SUPERBLOCKS)
    outs = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        seen = keys.first(s - t + stop)
        whole = start + (stop - start) // block * block
        if whole - start > block:
            outs.append(_scan(rule, queries.rows(start, whole), seen, block))
        elif whole > start:
            outs.append(_block(rule, queries.rows(start, whole), seen, t))
        if stop > whole:
            outs.append(_block(rule, queries.rows(whole, stop), seen, t))
    return jnp.concatenate(outs, axis=2)


def _block(rule, queries, keys, t):
    run = lambda queries, keys: attend(rule, queries, keys)
    return (run if t <= KEEP_WEIGHTS else jax.checkpoint(run))(queries, keys)


def _scan(rule, queries, keys, block):
    """Blocks of rows one after the other against the same keys."""
    n, m, t, _ = queries.q.shape
    count = t // block

    def split(x, axis):
        x = x.reshape(x.shape[:axis] + (count, block) + x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    ids = None if queries.ids is None else split(queries.ids, 1)
    bits = None if queries.bits is None else split(queries.bits, 2)
    rows = Queries(split(queries.q, 2), split(queries.at, 0), ids, bits)
    out = jax.lax.map(jax.checkpoint(lambda rows: attend(rule, rows, keys)), rows)
    return jnp.moveaxis(out, 0, 2).reshape(n, m, t, -1)
