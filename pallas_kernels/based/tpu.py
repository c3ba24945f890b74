"""The op on a TPU: Mosaic kernels for sequences, the compiler's fusion for one token.

Operands stand with tokens last, [b, heads, width, t]. That is a view, not a copy: XLA itself lays out [b, t, heads, width]
of narrow heads with tokens on lanes, and a projection writes that layout as cheaply as another.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.based import tpu_backward, tpu_forward, tpu_layout
from pallas_kernels.based.decode import decode
from pallas_kernels.based.tpu_layout import (
    align_state,
    make_plan,
    memory_estimate,
    pack_aligned,
    tokens_last,
    tokens_second,
)

DTYPES = ("float32", "bfloat16")


def forward(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    state: Float[Array, "b g e v1"] | None,
    ids: Int[Array, "b t"] | None,
    *,
    normalize: bool,
    epsilon: float,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b t h"], Float[Array, "b g e v1"]]:
    """y, the denominators of every token before epsilon, and the final state; `pallas_kernels.based.api` has the maths.

    q, k and v are zero at padding. Arguments must be such that `supports` returns None.
    """
    if q.shape[1] == 1 and state is not None:
        return decode(q, k, v, state, ids, normalize=normalize, epsilon=epsilon)
    plan = make_plan(q, k, v, ids)
    before = None if state is None else jnp.swapaxes(align_state(state, plan.f), 2, 3)
    out = tpu_forward.run(*_operands(q, k, v, plan), before, ids, plan, normalize, epsilon)
    y = tokens_second(out["y"], plan.t, plan.v)
    den = tokens_second(out["den"], plan.t, 1)[..., 0]
    return y, den, pack_aligned(jnp.swapaxes(out["after"], 2, 3), plan.f, plan.v)


def backward(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    state: Float[Array, "b g e v1"] | None,
    ids: Int[Array, "b t"] | None,
    y: Float[Array, "b t h v"],
    den: Float[Array, "b t h"],
    dy: Float[Array, "b t h v"],
    dstate: Float[Array, "b g e v1"] | None,
    *,
    normalize: bool,
    epsilon: float,
) -> tuple[
    Float[Array, "b t h f"],
    Float[Array, "b t g f"],
    Float[Array, "b t g v"],
    Float[Array, "b g e v1"] | None,
]:
    """Gradients of q, k, v and the initial state (None where there was none), of those of y and of the final state (None:
    zeros)."""
    plan = make_plan(q, k, v, ids)
    given = _operands(q, k, v, plan)
    dy = tokens_last(dy.astype(v.dtype), plan.V)
    before, after = (None if x is None else align_state(x, plan.f) for x in (state, dstate))
    outputs = None
    if normalize:
        outputs = tokens_last(y, plan.V), tokens_last(den[..., None].astype(jnp.float32), 1)
    first = tpu_backward.forwards(*given, outputs, dy, before, ids, plan, epsilon)
    rows = None if outputs is None else (outputs[1], first["dden"])
    wanted = state is not None
    second = tpu_backward.backwards(*given, rows, dy, after, ids, plan, epsilon, wanted)
    return (
        tokens_second(first["dq"], plan.t, plan.f),
        tokens_second(second["dk"], plan.t, plan.f),
        tokens_second(second["dv"], plan.t, plan.v),
        pack_aligned(second["before"], plan.f, plan.v) if wanted else None,
    )


def supports(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    state: Float[Array, "b g e v1"] | None = None,
    ids: Int[Array, "b t"] | None = None,
) -> str | None:
    """None where the kernels take these arguments (arrays or shapes), else the reason in words."""
    f, width = q.shape[3], v.shape[3]
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        found = ", ".join(sorted(dtypes))
        return f"q, k and v are {found}; the kernel takes one of {' and '.join(DTYPES)} for all"
    if state is not None and state.dtype != jnp.float32:
        return f"the state is {state.dtype.name}; the kernel keeps it in float32"
    if jax.config.jax_enable_x64:
        return "jax_enable_x64 is on, and Mosaic indexes by 32-bit integers"
    if f > tpu_layout.WIDEST_F:
        return f"f={f} is wider than {tpu_layout.WIDEST_F}"
    if width > tpu_layout.WIDEST_V:
        return f"v={width} is wider than {tpu_layout.WIDEST_V}"
    need = memory_estimate(make_plan(q, k, v, ids))
    if need > tpu_layout.MEMORY_LIMIT:
        heads = f"{q.shape[2]} query heads on {k.shape[2]} key/value heads"
        limit = tpu_layout.MEMORY_LIMIT >> 20
        return f"{heads} of f={f}, v={width} need {need >> 20} MiB of VMEM, of {limit} allowed"
    return None


def _operands(q, k, v, plan) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tokens_last(q, plan.F), tokens_last(k, plan.F), tokens_last(v, plan.V)
