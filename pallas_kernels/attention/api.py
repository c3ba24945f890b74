"""The public op; its docstring is the maths that every implementation is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import chunked, quadratic, reference, shipped
from pallas_kernels.attention.decode import one_row
from pallas_kernels.attention.inputs import Inputs, check_name, prepare, zero_padded
from pallas_kernels.attention.rows import Rule, fold, unfold

IMPLEMENTATIONS = ("reference", "quadratic", "chunked", "decode", *shipped.NAMES)
QUADRATIC_UP_TO = 512
FEW_QUERIES = 64  # against any number of keys: their weights are no larger than the keys


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    q_segment_ids: Int[Array, "b t"] | None = None,
    k_segment_ids: Int[Array, "b s"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t h v"]:
    """Causal softmax attention, y_i = sum_j w_ij v_j / sum_j w_ij, w_ij = exp(scale q_i . k_j) over the visible keys j.

    Query i is aligned with key i + s - t: the first s - t keys are history, earlier than every query. Key j is visible iff
    j <= i + s - t and, where ids are given, both carry the same positive id. h query heads share g key and value heads, h
    a multiple of g; query head i reads head i // (h / g). scale is 1 / sqrt(k) unless given. The softmax runs in float32
    or wider, the result has q's dtype. (Vaswani et al., arXiv 1706.03762.)

    q_segment_ids, k_segment_ids: both or neither. Id 0 is padding: such keys are never seen, such queries give 0, and
    whatever their slots hold (NaN included) reaches neither outputs nor gradients. A query that sees no key gives 0.
    dropout_rate, dropout_key: weights are dropped after normalisation and the rest scaled by 1 / (1 - rate). The same key
    drops the same weights in every implementation.
    implementation: "quadratic" (t x s weights), "chunked" (linear memory), "decode" (t = 1 only), "reference"; "splash" (TPU)
    and "cudnn" (GPU), which JAX ships (shipped.py); or None: the platform's shipped kernel where it takes the call, otherwise
    the fastest of the first three by length.

    Raises ValueError for shapes that do not fit, a dropout rate outside [0, 1) or without a key, and an implementation
    that does not exist or cannot run this.
    """
    check_name(implementation, IMPLEMENTATIONS)
    inputs = prepare(q, k, v, q_segment_ids, k_segment_ids, scale, dropout_rate, dropout_key)
    return run(inputs, dropout_rate, implementation)


def run(inputs: Inputs, rate: float, implementation: str | None) -> Float[Array, "b t h v"]:
    """The op on checked arguments."""
    t, s = inputs.q.shape[1], inputs.k.shape[1]
    if t == 0:
        return jnp.zeros(inputs.q.shape[:3] + inputs.v.shape[3:], inputs.q.dtype)
    if implementation is None:
        out = shipped.take_over(inputs, rate, None, lambda i: _run(i, rate, fastest(t, s)))
    elif implementation in shipped.NAMES:
        out = shipped.force(implementation, inputs, rate, None)
    else:
        out = _run(inputs, rate, implementation)
    return zero_padded(out, inputs.q_ids)


def _run(inputs: Inputs, rate: float, implementation: str) -> Float[Array, "b t h v"]:
    *arrays, scale = inputs
    if implementation == "decode":
        return decode(inputs, rate)
    if implementation == "reference":
        return reference.attention(*arrays, scale=scale, rate=rate)
    form = quadratic.attention if implementation == "quadratic" else chunked.attention
    return unfold(form(Rule(scale, rate), *fold(*arrays)), inputs.q.shape[0])


def decode(inputs: Inputs, rate: float) -> Float[Array, "b 1 h v"]:
    """One query per sequence, which sees all keys of its segment; ValueError for more."""
    q, k, v, q_ids, k_ids, bits, scale = inputs
    if q.shape[1] != 1:
        raise ValueError(f"implementation 'decode' takes one query per sequence, not {q.shape[1]}")
    visible = jnp.ones(k.shape[:2], bool)
    if q_ids is not None and k_ids is not None:
        visible = (q_ids == k_ids) & (k_ids > 0)
    return one_row(q, k, v, visible, bits, scale=scale, rate=rate)


def fastest(t: int, s: int) -> str:
    """The implementation for t queries and s keys.

    Forward and backward on two CPU cores, float32, width 64, milliseconds of processor time (batch x length x heads), a
    plain masked einsum last:

                      64 x 256 x 1   8 x 512 x 4   2 x 1024 x 4   1 x 2048 x 4
        quadratic           28            69             60            121
        chunked             35            72             54             96
        plain               39            98             94            301
    """
    if t == 1:
        return "decode"
    return "quadratic" if t <= FEW_QUERIES or t * s <= QUADRATIC_UP_TO**2 else "chunked"
