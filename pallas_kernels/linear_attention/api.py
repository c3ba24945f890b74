"""The public op; its docstring is the maths that every implementation is tested against."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_attention import chunked, reference
from pallas_kernels.linear_attention.one_chunk import IDENTITY
from pallas_kernels.linear_attention.varying import varying_like
from pallas_kernels.segment_ids import check_segment_ids

IMPLEMENTATIONS = ("reference", "quadratic", "chunked")
CHUNK = 128
CHANNEL_CHUNK = (
    64  # decay per channel forms [chunk / 16, chunk, k] factors: four of them, not eight
)
QUADRATIC_UP_TO = 256


def linear_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g v"],
    *,
    log_decay: Float[Array, "b t g"] | Float[Array, "b t g k"] | None = None,
    initial_state: Float[Array, "b g k w"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    normalize: bool = False,
    epsilon: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b g k w"]]:
    """Causal linear attention of queries and keys that already are features, with decay per head or per channel.

        S_t = diag(exp(a_t)) S_(t-1) + k_t v_t^T               state, [k, v]; a_t = log_decay <= 0, a number or one per k
        y_t = S_t^T q_t

    The decay of token t is applied before its own update, so k_t v_t^T itself is read undiminished at t: RetNet (a constant),
    Mamba-2 (per head), GLA (per channel). -inf forgets everything before t. h query heads share g key, value and decay heads.

    normalize: the values get a last column of ones, and y_t = num_t / (den_t + epsilon), den_t = q_t . (decayed) sum of k.
    The state is then [k, v + 1] wide, its last column that sum. Only for features that cannot be negative.
    initial_state, segment_ids: as in `pallas_kernels.based.based`. The first token's decay applies to the initial state;
    padding decays nothing.
    implementation: "quadratic" (one t x t product), "chunked" (a scan), "reference" (token by token), None for one of the
    first two by length. No exponential of a positive number is taken, whatever the decay.

    Differentiable in reverse mode, to any order, for q, k, v, log_decay and initial_state; "reference" in forward mode too.
    Keeps one state per chunk of 128 tokens (64 with decay per channel). float32 or wider accumulation; float32 products are
    full float32 on every platform.

    Raises ValueError for shapes that do not fit, an unknown implementation and, when concrete, for positive log decays and
    for segment ids that are negative or decrease.
    """
    _check(q, k, v, log_decay, initial_state, segment_ids, normalize)
    if implementation is None:
        implementation = "quadratic" if q.shape[1] <= QUADRATIC_UP_TO else "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
        )
    real = None
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        real = segment_ids > 0
        clear = lambda x: jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)
        q, k, v = clear(q), clear(k), clear(v)
        log_decay = None if log_decay is None else clear(log_decay)
    acc = jnp.promote_types(q.dtype, jnp.float32)
    state = None if initial_state is None else initial_state.astype(acc)
    if q.shape[1] == 0:
        zeros = jnp.zeros((*k.shape[:1], *k.shape[2:], v.shape[3] + bool(normalize)), acc)
        return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype), zeros if state is None else state
    # Inside shard_map gradients vary over the devices as their arrays do: so all vary alike.
    alike = lambda x: None if x is None else varying_like(x, (q, k, v, log_decay, state))
    arrays: Any = (*map(alike, (q, k, v, log_decay, state)), segment_ids)
    if implementation == "reference":
        y, state = reference.linear_attention(*arrays, normalize=normalize, epsilon=epsilon)
    else:
        channels = log_decay is not None and log_decay.ndim == 4
        chunk = CHANNEL_CHUNK if channels else CHUNK
        chunk = q.shape[1] if implementation == "quadratic" else chunk
        law = chunked.Law(IDENTITY, bool(normalize), bool(normalize), float(epsilon))
        y, _, state = _call(How(law, chunk), *arrays)
    return (y if real is None else jnp.where(real[..., None, None], y, 0)), state


class How(NamedTuple):
    law: chunked.Law
    chunk: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(how: How, q: Any, k: Any, v: Any, log_decay: Any, state: Any, ids: Any) -> Any:
    return chunked.forward(q, k, v, log_decay, state, ids, law=how.law, chunk=how.chunk)


def _call_forward(how, *marked):
    arrays = jax.tree.map(lambda x: x.value, marked, is_leaf=lambda x: hasattr(x, "perturbed"))
    y, den, final = chunked.forward(*arrays, law=how.law, chunk=how.chunk)
    return (y, den, final), (*arrays, y, den)


def _call_backward(how, kept: Any, cotangents):
    dy, _, dstate = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    q, k, v, log_decay, state, ids, y, den = kept
    dy = jnp.zeros_like(y) if dy is None else dy
    arrays = dict(state=state, ids=ids, y=y, den=den, dy=dy, dstate=dstate)
    gradients = chunked.backward(q, k, v, log_decay, **arrays, law=how.law, chunk=how.chunk)
    return *gradients, None


_call.defvjp(_call_forward, _call_backward, symbolic_zeros=True)


def _check(q, k, v, log_decay, initial_state, segment_ids, normalize) -> None:
    b, t, h, width = q.shape
    if k.shape[:2] != (b, t) or v.shape[:3] != k.shape[:3] or k.shape[3] != width:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} do not fit: they are [b, t, h, k], [b, t, g, k], [b, t, g, v]"
        )
    g = k.shape[2]
    if h % g:
        raise ValueError(f"{h} query heads cannot share {g} key/value heads evenly")
    if log_decay is not None:
        if log_decay.shape not in ((b, t, g), (b, t, g, width)):
            raise ValueError(
                f"log_decay is {log_decay.shape}; these keys need {(b, t, g)} or {(b, t, g, width)}"
            )
        if not isinstance(log_decay, Tracer) and not isinstance(segment_ids, Tracer):
            values = np.asarray(log_decay, np.float64)
            if segment_ids is not None:
                values = values[np.asarray(segment_ids) > 0]
            if not (values <= 0).all():
                raise ValueError(
                    f"log_decay must be 0 or less; its largest value is {values.max()}"
                )
    expected = (b, g, width, v.shape[3] + bool(normalize))
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"initial_state is {initial_state.shape}; k={width}, v={v.shape[3]}, normalize={bool(normalize)} need {expected}"
        )
    if segment_ids is not None:
        if segment_ids.shape != (b, t):
            raise ValueError(f"segment_ids is {segment_ids.shape}, not {(b, t)}")
        check_segment_ids(segment_ids)
