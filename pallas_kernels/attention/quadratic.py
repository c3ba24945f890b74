"""All visible weights at once, kept for the backward pass: the fastest form for short sequences."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.rows import Keys, Queries, Rule, attend

# Rows are cut into up to PIECES static pieces, each against the keys up to its own end, so that most of the upper triangle
# is never computed: 26 against 35 ms of processor time, forward and backward, at 64 x 256 rows of width 64 in float32.
PIECES = 4
SMALLEST = 64


def attention(rule: Rule, queries: Queries, keys: Keys) -> Float[Array, "n m t v"]:
    """Every row against every key up to its own, or the window before it."""
    t, s = queries.q.shape[2], keys.k.shape[1]
    size = max(SMALLEST, -(-t // PIECES))
    outs = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        oldest = 0 if rule.window is None else max(0, s - t + start - rule.window + 1)
        outs.append(attend(rule, queries.rows(start, stop), keys.between(oldest, s - t + stop)))
    return jnp.concatenate(outs, axis=2)
