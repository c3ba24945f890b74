"""The forward kernel for Hopper: a CTA walks one head of one row, and `tile` of its value columns."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.based import gpu_call, gpu_carry
from pallas_kernels.based import gpu_parts as parts
from pallas_kernels.based.gpu_call import Frame
from pallas_kernels.based.gpu_layout import CHUNK, READS, SLAB, WORKERS, Plan


def forward(
    plan: Plan, q: Any, k: Any, v: Any, info: Any, state: Any, *, normalize: bool, epsilon: float
) -> list[jax.Array]:
    """y [b, t, h, V], den [b, h, chunks * 64], and a state as `gpu_layout.to_kernel` has it, of padded arguments.

    info: `gpu_layout.segments`, None unless plan.segmented. state: None or the pair of `gpu_layout.to_kernel`.
    """
    n = plan.tile
    values, denominator = (None, None) if state is None else state
    inputs = dict(q=q, k=k, v=v, info=info, state=values, denominator=denominator)
    outputs = dict(
        y=jax.ShapeDtypeStruct((plan.b, plan.t, plan.h, plan.tiles * n), plan.dtype),
        den=jax.ShapeDtypeStruct((plan.b, plan.h, plan.chunks * CHUNK), jnp.float32),
        **gpu_call.state_outputs(plan, plan.g),
    )
    scratch = dict(
        weights=parts.swizzled(n, (WORKERS, CHUNK, CHUNK), plan.dtype),
        features=parts.swizzled(n, (WORKERS, 2, CHUNK, SLAB), plan.dtype),
        out=parts.swizzled(n, (WORKERS, CHUNK, n), plan.dtype),
        sums=plgpu.SMEM((WORKERS, CHUNK), jnp.float32),
    )

    def body(m: Frame) -> None:
        def carry(state):
            issue = lambda i: gpu_call.load_chunk(plan, m, i, i)
            return gpu_carry.carry(plan, m, state, issue, **gpu_carry.keys_and_values(plan, m))

        def leave(state):
            @pl.when(lax.rem(m.head, plan.h // plan.g) == 0)
            def _():
                gpu_call.write_state(plan, m, m.group, state)

        work = [lambda mine, i: _chunk(plan, m, mine, i, normalize, epsilon)]
        gpu_call.walk(plan, m, carry, leave, work)

    return gpu_call.launch(plan, body, inputs, outputs, scratch)


def _chunk(plan: Plan, m: Frame, mine: Any, i: Any, normalize: bool, epsilon: float) -> None:
    """y and den of chunk i."""
    half, slot = lax.rem(i, 2), lax.rem(i, plan.stages)
    plgpu.barrier_wait(m.full.at[slot])
    plgpu.barrier_wait(m.ready.at[half])
    q, k, v = m.q.at[slot], m.k.at[slot], m.v.at[slot]
    info = m.info.at[slot] if plan.segmented else None
    only = gpu_carry.masked(plan, m, READS)(slot)
    x = parts.tokens(q, only)

    def body(accumulator):
        [s] = parts.products((q, parts.transposed(k)))
        s = s * plan.f**-0.5
        weights = jnp.where(parts.visible(m.positions, info), 1 + s * (1 + 0.5 * s), 0.0)
        den = jnp.sum(weights, axis=1)
        m.weights.at[mine][...] = weights.astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, m.weights.at[mine], v)
        from_state = parts.zeros(plan.width)
        for s in range(plan.slabs):
            groups = plan.of_slab(s)
            rolled = parts.roll(q, m.rolls, plan, groups)
            made = parts.features(x, rolled, only, plan, groups, weighted=True)
            for group, value in zip(groups, made):
                from_state += value * parts.denominators(m, half, plan, group)
            # The product that read this buffer two slabs ago is complete: `roll` has waited since, and the warps have met.
            slab = m.features.at[mine, s % 2]
            slab[...] = parts.side_by_side(made, plan.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(accumulator, slab, m.states.at[half, s])
        return parts.read(accumulator), den + jnp.sum(from_state, axis=1)

    y, den = pl.run_scoped(body, parts.ACC((CHUNK, plan.tile)))
    plgpu.barrier_arrive(m.done.at[half])
    if normalize:
        y = y / parts.rows(den + epsilon, plan.tile)
    plgpu.wait_smem_to_gmem(0)
    m.out.at[mine][...] = y.astype(plan.dtype)
    m.sums.at[mine][...] = den
    plgpu.commit_smem()
    here = pl.ds(i * CHUNK, CHUNK)
    to = m.gmem["y"].at[m.row, here, m.head, pl.ds(m.column, plan.tile)]
    plgpu.copy_smem_to_gmem(m.out.at[mine], to)

    @pl.when(m.tile == 0)
    def _():
        plgpu.copy_smem_to_gmem(m.sums.at[mine], m.gmem["den"].at[m.row, m.head, here])
