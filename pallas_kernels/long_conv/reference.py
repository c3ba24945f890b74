"""The specification: the lower-triangular Toeplitz matrix of every channel, written out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def long_conv_reference(
    u: Float[Array, "b t d"],
    kernel: Float[Array, "m d"],
    segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t d"]:
    """y_i = sum over j <= i in the segment of i of kernel[i - j] * u_j; [b, t, t] masks and a [t, t, d] matrix.

    A lag past the end of the kernel has weight 0. Rows of padding (id 0) are 0, whatever u holds there.
    """
    t = u.shape[1]
    index = jnp.arange(t)
    lag = index[:, None] - index
    known = (lag >= 0) & (lag < kernel.shape[0])
    toeplitz = jnp.where(known[..., None], kernel[jnp.where(known, lag, 0)], 0)
    if segment_ids is None:
        return jnp.einsum("ijd,bjd->bid", toeplitz, u, precision=jax.lax.Precision.HIGHEST)
    real = segment_ids > 0
    u = jnp.where(real[..., None], u, 0)
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & real[:, :, None]
    weights = jnp.where(visible[..., None], toeplitz, 0)
    return jnp.einsum("bijd,bjd->bid", weights, u, precision=jax.lax.Precision.HIGHEST)


def long_conv_history_reference(
    history: Float[Array, "b m d"],
    count: Int[Array, " b"],
    kernel: Float[Array, "l d"],
    t: int,
) -> Float[Array, "b t d"]:
    """y_i = sum over the last min(count, m) positions p of kernel[count + i - p] * history[p mod m]; a [b, t, m, d] table."""
    m, length = history.shape[1], kernel.shape[0]
    # Slot s holds the newest position that is s modulo m: its distance to position `count` is 1 for the last token.
    back = (count[:, None] - 1 - jnp.arange(m)) % m + 1
    lag = back[:, None, :] + jnp.arange(t)[:, None]
    known = (back <= count[:, None])[:, None, :] & (lag < length)
    weights = jnp.where(known[..., None], kernel[jnp.where(known, lag, 0)], 0)
    return jnp.einsum("btmd,bmd->btd", weights, history, precision=jax.lax.Precision.HIGHEST)
