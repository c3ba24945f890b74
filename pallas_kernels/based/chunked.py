"""Linear time and memory: a scan over chunks that carries the state."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.based.quadratic import one_chunk

CHUNK = (
    128  # fastest of 32, 64, 128, 256 on two CPU cores at f = 16, v = 64 (docs/performance_log.md)
)


def scan_chunks(
    q: Float[Array, "b g r t f"],
    k: Float[Array, "b g t f"],
    v1: Float[Array, "b g t v1"],
    state: Float[Array, "b g e v1"],
    segment_ids: Int[Array, "b t"] | None,
    current: Int[Array, " b"] | None,
    chunk: int | None = None,
) -> tuple[Float[Array, "b g r t v1"], Float[Array, "b g e v1"]]:
    """As `one_chunk` over the whole sequence. Differentiating keeps one state per chunk and recomputes the rest.

    The length is padded to whole chunks with rows of v1 = 0, which add nothing to any sum, the constant term included.
    """
    t, chunk = q.shape[3], chunk or CHUNK
    n = -(-t // chunk)

    def split(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, n * chunk - t)
        x = jnp.pad(x, widths)
        return jnp.moveaxis(x.reshape(x.shape[:axis] + (n, chunk) + x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def body(carry, piece):
        state, current = carry
        q, k, v1, ids = piece
        out, state, current = one_chunk(q, k, v1, state, ids, current)
        return (state, current), out

    ids = None if segment_ids is None else split(segment_ids, 1)
    pieces = (split(q, 3), split(k, 2), split(v1, 2), ids)
    (state, _), out = jax.lax.scan(body, (state, current), pieces)
    out = jnp.moveaxis(out, 0, 3)
    return out.reshape(out.shape[:3] + (n * chunk, -1))[..., :t, :], state
