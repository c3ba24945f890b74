"""The causal long convolution, and the same convolution of a stored history into the tokens that follow it."""

from functools import reduce

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.long_conv.direct import lagged_conv_direct
from pallas_kernels.long_conv.fft import lagged_conv_fft
from pallas_kernels.long_conv.reference import long_conv_reference
from pallas_kernels.long_conv.segmented import segmented_conv

IMPLEMENTATIONS = ("reference", "direct", "fft")

# The Toeplitz matrix wins up to this many rows x columns per channel, if there are rows enough to pay for building it: at
# least a quarter as many as tokens. Measured forward and backward at d = 64 on 2 CPU cores, lengths 16 to 256, rows 2 to 256.
DIRECT_LIMIT = 128 * 128
DIRECT_TOKENS_PER_ROW = 4


def long_conv(
    u: Float[Array, "b t d"],
    kernel: Float[Array, "m d"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t d"]:
    """Causal convolution of every channel with its own filter.

        y_i[c] = sum over j <= i, j in the segment of i, of kernel[i - j, c] * u_j[c]

    Args:
      u: [b, t, d] inputs.
      kernel: [m, d], row = lag. Lags >= m have weight 0; rows past t are not looked at. m and t are free of each other.
      segment_ids: int [b, t]; equal ids must be neighbours (ids that never decrease, then padding). Id 0 is padding: it
        contributes nothing, NaN included, and its y is 0. None: one segment, no padding.
      implementation: None picks by size between "direct" (a Toeplitz matrix per channel) and "fft" (linear memory); with
        segments the choice is made at every level of the divide and conquer (segmented.py). "reference" is the
        specification, [t, t, d] large.

    Returns: [b, t, d] in the dtype of u. Sums and spectra are in float32, or wider if an input is.
    Raises: ValueError for shapes that do not fit together, or an unknown implementation.
    Source: Hyena (Poli et al. 2023, section 3); Zoology (Arora et al. 2023, BaseConv). Forward-mode differentiation is not
    available through "fft", which carries its own reverse rule.
    """
    _check_inputs(u, kernel, segment_ids)
    lagged_conv = _pick(implementation)
    dtype = _wide(u, kernel)
    wide, weights = u.astype(dtype), kernel.astype(dtype)
    if implementation == "reference":
        y = long_conv_reference(wide, weights, segment_ids)
    elif segment_ids is None:
        y = lagged_conv(wide, weights, 0, u.shape[1])
    else:
        y = segmented_conv(wide, weights, segment_ids, lagged_conv)
    return y.astype(u.dtype)


def long_conv_history(
    history: Float[Array, "b m d"],
    count: Int[Array, " b"],
    kernel: Float[Array, "l d"],
    t: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "b t d"]:
    """What the tokens before a call add to its t tokens, when those go on with the same segment.

        y_i = sum over positions p with max(0, count - m) <= p < count of kernel[count + i - p] * history[p mod m]

    so that long_conv over count + t tokens is this plus long_conv over the last t, as long as the filter reaches back no
    further than m tokens (or count <= m).

    Args:
      history: [b, m, d] ring: slot p mod m holds the token at position p of the current segment. While count <= m that is
        simply slot p = position p. Slots that hold no token are not read into the result.
      count: int [b], tokens of the segment so far; 0 gives 0.
      kernel: [l, d], row = lag.
      t: number of tokens to predict for; 1 costs O(m d) per row.

    Returns: [b, t, d] in the dtype of history; sums in float32 or wider.
    Raises: ValueError for shapes that do not fit together, t < 1, or an unknown implementation.
    """
    if history.ndim != 3 or kernel.ndim != 2 or history.shape[2] != kernel.shape[1]:
        raise ValueError(
            f"history [b, m, d] and kernel [l, d] do not fit: {history.shape}, {kernel.shape}"
        )
    if count.shape != history.shape[:1] or t < 1:
        raise ValueError(
            f"count must be [b] = {history.shape[:1]} and t >= 1, got {count.shape}, {t}"
        )
    lagged_conv = _pick(implementation)
    m = history.shape[1]
    dtype = _wide(history, kernel)
    # The last token to the last slot: from there on one filter serves every row, whatever its count.
    back = m - jnp.arange(m)
    slots = (count[:, None] - back) % m
    latest = jnp.take_along_axis(history, slots[..., None], axis=1)
    latest = jnp.where((back <= count[:, None])[..., None], latest, 0).astype(dtype)
    return lagged_conv(latest, kernel.astype(dtype), m, t).astype(history.dtype)


def _lagged_conv(x, kernel, offset, t):
    n, m = x.shape[:2]
    small = m * t <= DIRECT_LIMIT and min(m, t) <= DIRECT_TOKENS_PER_ROW * n
    return (lagged_conv_direct if small else lagged_conv_fft)(x, kernel, offset, t)


def _pick(implementation):
    table = {
        None: _lagged_conv,
        "direct": lagged_conv_direct,
        "fft": lagged_conv_fft,
        "reference": lagged_conv_direct,  # the Toeplitz matrix is the specification of a single lagged product
    }
    if implementation not in table:
        raise ValueError(
            f"unknown implementation {implementation!r}; long_conv has {', '.join(IMPLEMENTATIONS)}"
        )
    return table[implementation]


def _wide(*arrays):
    return reduce(jnp.promote_types, (a.dtype for a in arrays), jnp.float32)


def _check_inputs(u, kernel, segment_ids):
    if u.ndim != 3 or kernel.ndim != 2 or u.shape[2] != kernel.shape[1]:
        raise ValueError(f"u [b, t, d] and kernel [m, d] do not fit: {u.shape}, {kernel.shape}")
    if u.shape[1] < 1 or kernel.shape[0] < 1:
        raise ValueError(f"u and kernel need at least one row: {u.shape}, {kernel.shape}")
    if segment_ids is not None and segment_ids.shape != u.shape[:2]:
        raise ValueError(f"segment_ids must be [b, t] = {u.shape[:2]}, got {segment_ids.shape}")
