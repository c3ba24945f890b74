"""Segments by divide and conquer over block boundaries.

Cut the row into blocks of B tokens. A token of a right-hand block and a token of the block to its left share a segment only
if both belong to the one segment that spans the boundary between the two. So mask both halves to that segment and convolve
the left half into the right half with the plain filter: exact, whatever the number of segments, and every pair of tokens is
met at exactly one block size. All boundaries of one size go through one convolution; the smallest blocks are done tap by tap.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SMALLEST_BLOCK = 4

LaggedConv = Callable[[Array, Array, int, int], Array]


def segmented_conv(
    u: Float[Array, "b t d"],
    kernel: Float[Array, "m d"],
    segment_ids: Int[Array, "b t"],
    lagged_conv: LaggedConv,
) -> Float[Array, "b t d"]:
    """Causal convolution inside each segment; `lagged_conv(x, kernel, offset, t)` does one level's boundaries."""
    _, t, d = u.shape
    block, levels = block_plan(t)
    padded = block << levels
    ids = jnp.pad(segment_ids, ((0, 0), (0, padded - t)))
    u = jnp.pad(jnp.where((segment_ids > 0)[..., None], u, 0), ((0, 0), (0, padded - t), (0, 0)))
    y = _inside_blocks(u.reshape(-1, block, d), kernel, ids.reshape(-1, block)).reshape(u.shape)
    for level in range(levels):
        size = block << level
        pairs = u.reshape(-1, 2, size, d)
        left, right = _spanning(ids.reshape(-1, 2, size))
        source = jnp.where(left[..., None], pairs[:, 0], 0)
        # Barriers: without them XLA on a CPU recomputes the masks of all levels inside one another's loops, which doubles
        # the time of the gradient.
        carried = lagged_conv(jax.lax.optimization_barrier(source), kernel, size, size)
        carried = jnp.where(right[..., None], jax.lax.optimization_barrier(carried), 0)
        y = y + jnp.pad(carried[:, None], ((0, 0), (1, 0), (0, 0), (0, 0))).reshape(y.shape)
    return jnp.where((segment_ids > 0)[..., None], y[:, :t], 0)


def block_plan(t: int) -> tuple[int, int]:
    """(smallest block, levels): block * 2^levels >= t with less than 2^levels tokens of waste."""
    levels = 0
    while (SMALLEST_BLOCK << levels) < t:
        levels += 1
    return -(-t // (1 << levels)), levels


def _spanning(
    ids: Int[Array, "n 2 s"],
) -> tuple[Bool[Array, "n s"], Bool[Array, "n s"]]:
    """Tokens of the left and of the right half that belong to the segment spanning the boundary, if one does."""
    edge = ids[:, 0, -1:]
    left = (ids[:, 0] == edge) & (ids[:, 1, :1] == edge) & (edge > 0)
    return left, (ids[:, 1] == edge) & (edge > 0)


def _inside_blocks(
    u: Float[Array, "n c d"], kernel: Float[Array, "m d"], ids: Int[Array, "n c"]
) -> Float[Array, "n c d"]:
    block = u.shape[1]
    y = kernel[0] * u
    for lag in range(1, min(block, kernel.shape[0])):
        same = (ids[:, lag:] == ids[:, :-lag])[..., None]
        term = kernel[lag] * jnp.where(same, u[:, :-lag], 0)
        y = y + jnp.pad(term, ((0, 0), (lag, 0), (0, 0)))
    return y
