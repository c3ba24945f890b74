"""The frame of a Hopper kernel: its grid and memory, where a CTA stands, what it loads and what it leaves."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.based import gpu_carry, gpu_parts
from pallas_kernels.based.gpu_layout import CHUNK, SLAB, WORKERS, Plan, one_column, rolls_matrix

# Registers of a thread when three warpgroups share the 504 that a CTA can have for three threads: the state needs more.
STATE_REGISTERS, WORKER_REGISTERS = 184, 160


class Frame(SimpleNamespace):
    """References of a running kernel by name: `m.q` in shared memory, `m.gmem["q"]` in device memory.

    row, head, group, tile, column: which head of which row the CTA walks, and which columns of the values are its own.
    """


def launch(
    plan: Plan,
    body: Callable[[Frame], None],
    inputs: dict[str, Any],
    outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    together: bool = False,
) -> list[jax.Array]:
    """body(m) by every warpgroup of b * h * tiles CTAs; the outputs in their order."""
    F, n, stages, dtype = plan.width, plan.tile, plan.stages, plan.dtype
    rolls = jnp.asarray(rolls_matrix(F), dtype)
    ones = jnp.asarray(one_column(), dtype)
    positions = jnp.arange(CHUNK, dtype=jnp.int32)
    inputs = dict(inputs, rolls=rolls, ones=ones, positions=positions)
    inputs = {name: x for name, x in inputs.items() if x is not None}
    names = [*inputs, *outputs]
    scratch = scratch | dict(
        q=gpu_parts.swizzled(F, (stages, CHUNK, F), dtype),
        k=gpu_parts.swizzled(F, (stages, CHUNK, F), dtype),
        v=gpu_parts.swizzled(n, (stages, CHUNK, n), dtype),
        rolls=gpu_parts.swizzled(F, rolls.shape, dtype),
        ones=gpu_parts.swizzled(n, ones.shape, dtype),
        positions=plgpu.SMEM((CHUNK,), jnp.int32),
        constants=plgpu.Barrier(num_arrivals=3),
    )
    if plan.segmented:
        scratch |= dict(info=plgpu.SMEM((stages, 4, CHUNK), jnp.int32))
    copied = [
        name for name in ("q", "k", "v", "dy", "scales", "cotangents", "info") if name in inputs
    ]
    scratch |= gpu_carry.state_buffers(plan) | gpu_carry.barriers(plan, len(copied), together)

    def run(*refs, **scratch):
        body(Frame(gmem=dict(zip(names, refs)), copied=copied, **scratch, **_place(plan)))

    kernel = plgpu.kernel(
        run,
        out_type=list(outputs.values()),
        scratch_types=scratch,
        grid=(plan.b * plan.h * plan.tiles,),
        grid_names=("cta",),
        num_threads=1 + WORKERS,
        thread_name="warpgroup",
        compiler_params=gpu_parts.COMPILER,
    )
    return kernel(*inputs.values())


def _place(plan: Plan) -> dict[str, Any]:
    # One axis, which CUDA calls x and which has room for 2^31; the others stop at 65,535.
    index = lax.axis_index("cta")
    tile, head = lax.rem(index, plan.tiles), lax.rem(lax.div(index, plan.tiles), plan.h)
    return dict(
        row=lax.div(index, plan.tiles * plan.h),
        head=head,
        group=lax.div(head, plan.h // plan.g),
        tile=tile,
        column=tile * plan.tile,
    )


def walk(
    plan: Plan,
    m: Frame,
    carry: Callable[[tuple[jax.Array, ...]], tuple[jax.Array, ...]],
    leave: Callable[[tuple[jax.Array, ...]], None],
    work: Sequence[Callable[[Any, Any], None]],
) -> None:
    """Warpgroup 0: leave(carry(the given state)). The workers: work[0](w, i) in turns, or work[w](0, i) of all steps i."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        plgpu.set_max_registers(STATE_REGISTERS, action="increase")
        for name in ("rolls", "ones", "positions"):
            plgpu.copy_gmem_to_smem(m.gmem[name], getattr(m, name), m.constants)
        plgpu.barrier_wait(m.constants)
        state = gpu_parts.empty_state(plan)
        if "state" in m.gmem:
            per_head = m.gmem["state"].shape[1] == plan.h
            head = m.head if per_head else m.group
            values = m.gmem["state"].at[m.row, head, m.tile]
            state = gpu_parts.read_state(values, m.gmem["denominator"].at[m.row, head], plan)
        leave(carry(state))
        gpu_carry.finish(plan, m)

    @pl.when(warpgroup > 0)
    def _():
        plgpu.set_max_registers(WORKER_REGISTERS, action="decrease")
        plgpu.barrier_wait(m.constants)

    if len(work) == 1:

        @pl.when(warpgroup > 0)
        def _():
            _steps(plan, work[0], warpgroup - 1, warpgroup - 1, WORKERS)

    else:
        for w, part in enumerate(work):

            @pl.when(warpgroup == 1 + w)
            def _(part=part):
                _steps(plan, part, 0, 0, 1)

    # No warpgroup leaves before the others are done.
    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def _steps(
    plan: Plan, work: Callable[[Any, Any], None], mine: Any, first: Any, stride: int
) -> None:
    """work(mine, i) for i = first, first + stride, ..."""

    def step(j, _):
        # The compiler shall not know that the buffers stay the same: it would keep the addresses of all in registers.
        work(lax.optimization_barrier(jnp.int32(mine)), first + j * stride)
        return _

    count = lax.div(plan.chunks - jnp.int32(first) + stride - 1, stride)
    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


def load_chunk(plan: Plan, m: Frame, step: Any, chunk: Any) -> None:
    """Starts the copies of a chunk into the slot of `step`."""
    slot = lax.rem(jnp.int32(step), plan.stages)
    some, tile = pl.ds(chunk * CHUNK, CHUNK), pl.ds(m.column, plan.tile)
    where = dict(
        q=(m.row, some, m.head),
        k=(m.row, some, m.group),
        v=(m.row, some, m.group, tile),
        dy=(m.row, some, m.head, tile),
        scales=(m.row, m.head, chunk),
        cotangents=(m.row, m.head, chunk),
        info=(m.row, chunk),
    )
    for name in m.copied:
        to = getattr(m, name).at[slot]
        plgpu.copy_gmem_to_smem(m.gmem[name].at[where[name]], to, m.full.at[slot])


def write_state(plan: Plan, m: Frame, head: Any, state: tuple[jax.Array, ...]) -> None:
    """The state in registers to `final`; every tile of values has its columns, the first also the denominator."""
    for s in range(plan.slabs):
        here = (m.row, head, m.tile, pl.ds(s * SLAB, SLAB))
        m.gmem["final"].at[here][...] = state[s]

    @pl.when(m.tile == 0)
    def _():
        for s in range(plan.slabs):
            here = (m.row, head, pl.ds(s * SLAB, SLAB))
            m.gmem["final_denominator"].at[here][...] = state[plan.slabs + s]


def state_outputs(plan: Plan, heads: int) -> dict[str, jax.ShapeDtypeStruct]:
    values = (plan.b, heads, plan.tiles, plan.rows, plan.tile)
    return dict(
        final=jax.ShapeDtypeStruct(values, jnp.float32),
        final_denominator=jax.ShapeDtypeStruct((plan.b, heads, plan.rows), jnp.float32),
    )
