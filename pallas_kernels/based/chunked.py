"""Linear time and memory: a scan over chunks that carries the state."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.based.quadratic import one_chunk

CHUNK = (
    128  # fastest of 32, 64, 128, 256 on two CPU cores at f = 16, v = 64 (docs/performance_log.md)
)


def scan_chunks(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    state: Float[Array, "b g e v1"],
    segment_ids: Int[Array, "b t"] | None,
    chunk: int | None = None,
) -> tuple[Float[Array, "b t h v1"], Float[Array, "b g e v1"]]:
    """As `quadratic.whole`. Differentiating keeps one state per chunk and recomputes the rest.

    The length is padded to whole chunks with rows that are not real: their values, and their ones, are zeros, so that they
    add nothing to any sum, the constant term included. Heads move before tokens inside a chunk, where the copy is small.
    """
    t, chunk = q.shape[1], chunk or CHUNK
    n = -(-t // chunk)
    real = jnp.ones(q.shape[:2], bool) if segment_ids is None else segment_ids > 0

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, n * chunk - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], n, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(carry, piece):
        state, current = carry
        q, k, v, real, ids = piece
        out, state, current = one_chunk(q, k, v, real, ids, state, current)
        return (state, current), out

    current = None if segment_ids is None else segment_ids[:, 0]
    ids = None if segment_ids is None else split(segment_ids)
    (state, _), out = jax.lax.scan(
        body, (state, current), (split(q), split(k), split(v), split(real), ids)
    )
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], n * chunk, *out.shape[3:])[:, :t], state
