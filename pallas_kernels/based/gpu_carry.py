"""The warpgroup that carries the state along a sequence, and the schedule that it and the workers keep.

Warpgroup 0 walks the chunks in order. At step i it

    loads the chunk of step i + stages - 2       once step i - 2 is done, whose buffers that takes
    publishes its state in narrow precision      into half i % 2, for the worker of step i; rounded here and nowhere else
    adds the features of the chunk times its values to the state, float32, in registers

while the workers compute outputs with the published states: either in turns, worker w at the steps w, w + 2, ..., or together,
each its part of every step. Barriers, each in a ring:

    full[i % stages]   the chunk of step i has arrived          (the copies arrive)
    ready[i % 2]       the state before step i is published     (warpgroup 0 arrives)
    done[i % 2]        nobody reads chunk or state of step i    (its workers arrive)
    end                the kernel is over                       (all arrive, all wait)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.based import gpu_parts as parts
from pallas_kernels.based.gpu_layout import ADDS, CHUNK, KEEPS, SLAB, WORKERS, Plan


def barriers(plan: Plan, copies: int, together: bool) -> dict[str, Any]:
    return dict(
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
        ready=plgpu.Barrier(num_barriers=2),
        done=plgpu.Barrier(num_arrivals=WORKERS if together else 1, num_barriers=2),
        end=plgpu.Barrier(num_arrivals=1 + WORKERS),
    )


def state_buffers(plan: Plan) -> dict[str, Any]:
    """The two published states, and the slabs of features of the warpgroup that makes them."""
    dtype, n = plan.dtype, plan.tile
    return dict(
        states=parts.swizzled(n, (2, plan.slabs, SLAB, n), dtype),
        denominators=plgpu.SMEM((2, plan.rows), jnp.float32),
        slabs=parts.swizzled(n, (plan.ring, CHUNK, SLAB), dtype),
    )


def carry(
    plan: Plan,
    m: Any,
    state: tuple[jax.Array, ...],
    issue: Callable[[Any], None],
    operands: Callable[[Any], tuple[Any, Any, Any]],
    only: Callable[[Any], jax.Array | None],
    weighted: bool,
) -> tuple[jax.Array, ...]:
    """The state after all steps.

    issue(i) starts the copies of step i. operands(slot) are references to what makes the features [64, F], to the values [64,
    tile], and to the [8, 64] matrix whose product with the features is added to the denominator's part. only(slot) scales the
    features of each token.
    """
    n, stages = plan.chunks, plan.stages
    # A loop, not Python's: the last chunk may end past the array, and an index that is known is checked when traced.
    lax.fori_loop(0, min(stages - 2, n), lambda i, _: issue(i), None)

    def step(i, state):
        half, slot = lax.rem(i, 2), lax.rem(i, stages)

        @pl.when(i >= 2)
        def _():
            plgpu.barrier_wait(m.done.at[half])

        @pl.when(i + stages - 2 < n)
        def _():
            issue(i + stages - 2)

        for s in range(plan.slabs):
            m.states.at[half, s][...] = state[s].astype(plan.dtype)
            m.denominators.at[half, pl.ds(s * SLAB, SLAB)][...] = state[plan.slabs + s]
        plgpu.commit_smem()
        plgpu.barrier_arrive(m.ready.at[half])

        plgpu.barrier_wait(m.full.at[slot])
        # As for the workers: with indices that it knows the compiler would keep the addresses of all slabs in registers.
        zero = lax.optimization_barrier(jnp.int32(0))
        slabs = [m.slabs.at[zero + s] for s in range(plan.ring)]
        return _update(plan, m, slabs, state, slot, operands(slot), only(slot), weighted)

    return lax.fori_loop(0, n, step, state)


def finish(plan: Plan, m: Any) -> None:
    """Waits for the workers of the last steps, for which no later step has."""
    for i in range(max(plan.chunks - 2, 0), plan.chunks):
        plgpu.barrier_wait(m.done.at[i % 2])


def _update(plan, m, slabs, state, slot, operands, only, weighted):
    x_ref, values, below = operands
    x = parts.tokens(x_ref, only)
    if plan.segmented:
        keeps = parts.load(m.info.at[slot, KEEPS], parts.ROW) > 0
        state = tuple(_where(keeps, old) for old in state)
    new = list(state)
    for first in range(0, plan.slabs, plan.ring):
        block = range(first, min(first + plan.ring, plan.slabs))
        if first:
            plgpu.commit_smem()  # every warp has read the products of the slabs that are now overwritten
        for s in block:
            groups = plan.of_slab(s)
            rolled = parts.roll(x_ref, m.rolls, plan, groups)
            made = parts.features(x, rolled, only, plan, groups, weighted)
            slabs[s - first][...] = parts.side_by_side(made, plan.dtype)
        plgpu.commit_smem()
        for s in block:
            slab = parts.transposed(slabs[s - first])
            update, sums = parts.products((slab, values), (slab, parts.transposed(below)))
            new[s] += update
            new[plan.slabs + s] += jnp.sum(sums, axis=1)
    return tuple(new)


def _where(keeps: jax.Array, old: jax.Array) -> jax.Array:
    """`old` where the state lives on, else zeros."""
    if old.ndim == 1:
        return jnp.where(keeps, old, plgpu.layout_cast(jnp.zeros_like(old), parts.ROW))
    return jnp.where(parts.rows(keeps, old.shape[1]), old, parts.zeros(old.shape[1]))


def masked(plan: Plan, m: Any, which: int) -> Callable[[Any], jax.Array | None]:
    """The mask of a chunk's tokens; None where every token counts."""
    return lambda slot: parts.mask_of(m.info.at[slot], which) if plan.segmented else None


def keys_and_values(plan: Plan, m: Any) -> dict[str, Any]:
    """The operands of the state of a forward sweep."""
    return dict(
        operands=lambda slot: (m.k.at[slot], m.v.at[slot], m.ones),
        only=masked(plan, m, ADDS),
        weighted=False,
    )
