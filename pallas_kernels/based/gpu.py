"""The op on Hopper (sm_90a), through Mosaic GPU; see `pallas_kernels.based.api` for the maths.

Three kernels for sequences, and the compiler's fusion for one token: `decode` compiles for an H200 to one fusion that reads the
state once and writes it once, in place where the caller donates it (tests/gates/kernels_gpu.py counts).
"""

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.based import gpu_backward, gpu_forward
from pallas_kernels.based import gpu_layout as layout
from pallas_kernels.based.decode import decode
from pallas_kernels.based.gpu_layout import CHUNK, Plan

WIDEST_F, WIDEST_V = 32, 128
# What CUDA calls the cards of compute capability 9.0, for which alone these kernels are.
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


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
    """y, the denominators before epsilon, and the final state. q, k and v are zero at padding."""
    if q.shape[1] == 1 and state is not None:
        return decode(q, k, v, state, ids, normalize=normalize, epsilon=epsilon)
    plan = layout.plan_of(q, k, v, ids)
    t, width = q.shape[1], v.shape[3]
    info = layout.segments(ids, plan, t) if plan.segmented else None
    before = None if state is None else layout.to_kernel(state, plan)
    q, k, v = _padded(plan, q), _padded(plan, k), _padded(plan, v, values=True)
    y, den, final, below = gpu_forward.forward(
        plan, q, k, v, info, before, normalize=normalize, epsilon=epsilon
    )
    den = jnp.moveaxis(den, 1, 2)[:, :t]
    return y[:, :t, :, :width], den, layout.to_packed(final, below, plan, width)


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
    """The gradients for q, k, v and the initial state (None where there was none)."""
    plan = layout.plan_of(q, k, v, ids)
    (_, t, h, f), g, width = q.shape, k.shape[2], v.shape[3]
    info = layout.segments(ids, plan, t) if plan.segmented else None
    scales, cotangents = _of_tokens(plan, y, den, dy, normalize, epsilon)
    before = None if state is None else layout.to_kernel(state, plan)
    after = None
    if dstate is not None:
        # A group's cotangent belongs to all of its heads together: the first carries it.
        values, below = layout.to_kernel(dstate, plan, cotangent=True)
        after = _first_head(values, h // g), _first_head(below, h // g)

    q, k = _padded(plan, q), _padded(plan, k)
    v, dy = (_padded(plan, x.astype(plan.dtype), values=True) for x in (v, dy))
    [dq] = gpu_backward.queries(plan, q, k, v, dy, scales, info, before)
    dk, dv, dvalues, dbelow = gpu_backward.keys(plan, q, k, v, dy, scales, cotangents, info, after)
    dq = _summed(dq, 0)[:, :t, :, :f].astype(plan.dtype)
    dk = _per_group(_summed(dk, 0)[:, :t, :, :f], 2, g).astype(plan.dtype)
    dv = _per_group(dv[:, :t, :, :width], 2, g).astype(plan.dtype)
    if state is None:
        return dq, dk, dv, None
    dvalues, dbelow = _per_group(dvalues, 1, g), _per_group(dbelow, 1, g)
    return dq, dk, dv, layout.to_packed(dvalues, dbelow, plan, width, cotangent=True)


def supports(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    state: Float[Array, "b g e v1"] | None = None,
    ids: Int[Array, "b t"] | None = None,
) -> str | None:
    """None where the kernels take these arguments (arrays or shapes) and the device is a Hopper, else the reason in words."""
    f, width = q.shape[3], v.shape[3]
    dtypes = sorted({x.dtype.name for x in (q, k, v)})
    if dtypes != ["bfloat16"]:
        # float16 has the tensor cores' speed too, but sums over a sequence do not fit into it.
        return f"q, k and v are {', '.join(dtypes)}; the kernel takes bfloat16"
    if state is not None and state.dtype != jnp.float32:
        return f"the state is {state.dtype.name}; the kernel keeps it in float32"
    if jax.config.jax_enable_x64:
        return "jax_enable_x64 is on, and Mosaic indexes by 32-bit integers"
    if f > WIDEST_F:
        return f"f={f} is wider than {WIDEST_F}"
    if width > WIDEST_V:
        return f"v={width} is wider than {WIDEST_V}"
    kind = _device_kind()
    if kind is None or not HOPPER.search(kind):
        return f"it needs Hopper (H100, H200), and the device is {kind or 'not a GPU'}"
    return None


def _device_kind() -> str | None:
    """Of the mesh that the program is traced under, where that says (a compilation for absent devices); else of the backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind if device.platform in ("gpu", "cuda") else None


def _padded(plan: Plan, x: Array, values: bool = False) -> Array:
    """A copy only where the width is not one of the kernel's, or t is not a multiple of 8."""
    return layout.pad_to(x, plan.t, plan.tiles * plan.tile if values else plan.width)


def _of_tokens(
    plan: Plan, y: Array, den: Array, dy: Array, normalize: bool, epsilon: float
) -> tuple[Float[Array, "b h n 2 64"], Float[Array, "b h n 8 64"]]:
    """c = 1 / (den + epsilon) and -(dy . y) c; and -(dy . y) as a matrix of eight rows, see `gpu_backward`."""
    wide = jnp.float32
    if normalize:
        c = 1 / (den + epsilon)
        dots = -jnp.sum(dy.astype(wide) * y.astype(wide), axis=3)
    else:
        c, dots = jnp.ones(den.shape, wide), jnp.zeros(den.shape, wide)

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, plan.chunks * CHUNK - x.shape[1]), (0, 0)))
        return jnp.moveaxis(x, 2, 1).reshape(plan.b, plan.h, plan.chunks, 1, CHUNK)

    c, dots = chunks(c), chunks(dots)
    eight = jnp.pad(dots, ((0, 0),) * 3 + ((0, 7), (0, 0))).astype(plan.dtype)
    return jnp.concatenate([c, dots * c], axis=3), eight


def _summed(x: Array, axis: int) -> Array:
    return x.squeeze(axis) if x.shape[axis] == 1 else jnp.sum(x, axis=axis, dtype=jnp.float32)


def _per_group(x: Array, axis: int, groups: int) -> Array:
    """Sums the heads of each group."""
    shape = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
    return _summed(x.reshape(shape), axis + 1)


def _first_head(x: Array, heads: int) -> Array:
    """[b, g, ...] as [b, g * heads, ...], zeros but for the first of each group's heads."""
    if heads == 1:
        return x
    x = jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, heads - 1)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, *x.shape[3:])
