"""The public op; its docstring is the maths that every implementation is tested against."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import shipped
from pallas_kernels.attention.api import decode, run
from pallas_kernels.attention.inputs import Inputs, check_name, prepare, zero_padded
from pallas_kernels.sliding_window import chunked, quadratic, reference

FORMS = {
    "reference": reference.attention,
    "quadratic": quadratic.attention,
    "chunked": chunked.attention,
}
IMPLEMENTATIONS = (*FORMS, "decode", *shipped.NAMES)


def sliding_window(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    window: int,
    q_segment_ids: Int[Array, "b t"] | None = None,
    k_segment_ids: Int[Array, "b s"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t h v"]:
    """Softmax attention to `window` keys, the query's own included: `attention` with j > i + s - t - window as well.

    window = 1 is the value itself. The window counts slots, also those of other segments; everything else is as in
    `pallas_kernels.attention`. (Longformer, arXiv 2004.05150, one-sided.)

    implementation: "chunked" (the band only, O(t window) time and memory), "quadratic" (t x s weights), "decode" (t = 1
    only), "reference"; "splash" (TPU) and "cudnn" (GPU), which JAX ships (attention/shipped.py); or None: the platform's
    shipped kernel where it takes the call, otherwise the fastest of the first three by length.

    Raises ValueError for a window below 1, and as `attention` does.
    """
    check_name(implementation, IMPLEMENTATIONS)
    if window < 1:
        raise ValueError(f"window counts keys, the query's own included: at least 1, not {window}")
    inputs = prepare(q, k, v, q_segment_ids, k_segment_ids, scale, dropout_rate, dropout_key)
    t, s = q.shape[1], k.shape[1]
    if t == 0 or (implementation is None and window >= s):
        return run(inputs, dropout_rate, None)
    if implementation is None:
        run_form = lambda i: _run(i, dropout_rate, window, fastest(t, window))
        out = shipped.take_over(inputs, dropout_rate, window, run_form)
    elif implementation in shipped.NAMES:
        out = shipped.force(implementation, inputs, dropout_rate, window)
    else:
        out = _run(inputs, dropout_rate, window, implementation)
    return zero_padded(out, q_segment_ids)


def _run(inputs: Inputs, rate: float, window: int, implementation: str) -> Float[Array, "b t h v"]:
    if implementation == "decode":
        return decode(inputs.last_keys(window), rate)
    return FORMS[implementation](inputs, rate, window)


def fastest(t: int, window: int) -> str:
    """The implementation for t queries.

    Forward and backward on two CPU cores, float32, width 64, milliseconds of processor time (batch x length x heads,
    window), a plain masked einsum last:

                      64x256x1, 16   8x512x4, 64   8x512x4, 256   2x1024x4, 16   2x1024x4, 256
        quadratic          14            35             58             16             26
        chunked            15            28             92              7             32
        plain              38            90             89             90             92
    """
    if t == 1:
        return "decode"
    return "quadratic" if t <= max(256, min(4 * window, 1024)) else "chunked"
