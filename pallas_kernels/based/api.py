"""The public op; its docstring is the maths that every implementation is tested against."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.based import dispatch, gradients, reference
from pallas_kernels.based.dispatch import How
from pallas_kernels.based.feature_map import expanded_width
from pallas_kernels.linear_attention.varying import varying_like
from pallas_kernels.segment_ids import check_segment_ids

IMPLEMENTATIONS = ("reference", "quadratic", "chunked", "tpu", "gpu")


def based(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    *,
    initial_state: Float[Array, "b g e v1"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    normalize: bool = True,
    epsilon: float = 1e-12,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b g e v1"]]:
    """Causal linear attention with the Taylor map phi(q) . phi(k) = 1 + s + s^2/2, s = q . k / sqrt(f).

        S_t = S_(t-1) + phi(k_t) [v_t, 1]^T                    state, [e, v+1], e = 1 + f + f(f+1)/2
        [num_t, den_t] = S_t^T phi(q_t)
        y_t = num_t / (den_t + epsilon)      or num_t when not normalize

    BASED, arXiv 2402.18668, section 4; the packing of the state is that of `feature_map`. h query heads share g key and
    value heads, h a multiple of g.

    initial_state: the state before the first token; it belongs to the segment of that token. The final state comes back in
    the same layout, float32 or wider, and holds the last segment only.
    segment_ids: positive ids that never decrease, then zeros. Zero is padding: it adds nothing, not even the constant
    term, leaves the state alone, and its y is 0. A change of id empties the state.
    epsilon: a number; 1e-12 in the published checkpoints, 1e-6 in flash-linear-attention. den_t is at least half the number
    of keys.
    implementation: "quadratic" (one t x t product), "chunked" (a scan, linear in t), "tpu" and "gpu" (the Pallas kernels),
    "reference" (token by token); or None, which takes the kernel of the platform that the program is compiled for where
    there is one for these arguments, and else the faster of the first two by length. What keeps a kernel from being taken
    goes once to the logger "pallas_kernels".

    Derivatives: reverse mode for all of q, k, v and initial_state, of any order. jax.jvp raises JAX's TypeError except for
    "reference".

    Raises ValueError for shapes that do not fit, for an unknown implementation, for a named kernel that cannot take the
    arguments, and for concrete segment ids that are negative or decrease.
    """
    _check_shapes(q, k, v, initial_state, segment_ids)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
        )
    real = None
    if segment_ids is not None:
        real = (segment_ids > 0)[..., None, None]
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
        segment_ids = segment_ids.astype(jnp.int32)
    acc = jnp.promote_types(q.dtype, jnp.float32)
    state = None if initial_state is None else initial_state.astype(acc)
    if q.shape[1] == 0:
        b, _, g, width = v.shape
        zeros = jnp.zeros((b, g, expanded_width(q.shape[3]), width + 1), acc)
        return jnp.zeros((b, 0, q.shape[2], width), v.dtype), zeros if state is None else state
    # Inside shard_map gradients vary over the devices as their arrays do: so all vary alike.
    given = (q, k, v) if state is None else (q, k, v, state)
    q, k, v, *rest = (varying_like(x, given) for x in given)
    state = rest[0] if rest else None
    if implementation == "reference":
        y, state = reference.based(q, k, v, state, segment_ids, normalize, epsilon)
    else:
        if implementation in dispatch.KERNELS:
            reason = dispatch.why_not(implementation, q, k, v, state, segment_ids)
            if reason is not None:
                raise ValueError(f"implementation={implementation!r} cannot run here: {reason}")
        how = How(implementation, bool(normalize), float(epsilon))
        y, _, state = gradients.call(how, q, k, v, state, segment_ids)
    return (y if real is None else jnp.where(real, y, 0)), state


def _check_shapes(q, k, v, initial_state, segment_ids) -> None:
    b, t, h, f = q.shape
    if k.shape[:2] != (b, t) or v.shape[:3] != k.shape[:3] or k.shape[3] != f:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} do not fit: they are [b, t, h, f], [b, t, g, f], [b, t, g, v]"
        )
    if h % k.shape[2]:
        raise ValueError(f"{h} query heads cannot share {k.shape[2]} key/value heads evenly")
    expected = (b, k.shape[2], expanded_width(f), v.shape[3] + 1)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"initial_state is {initial_state.shape}; f={f} and v={v.shape[3]} need {expected}"
        )
    if segment_ids is not None and segment_ids.shape != (b, t):
        raise ValueError(f"segment_ids is {segment_ids.shape}, not {(b, t)}")
    if segment_ids is not None:
        check_segment_ids(segment_ids)
