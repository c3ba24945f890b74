"""The backward kernels for Hopper: a forward sweep for dq, and a reverse sweep for dk, dv and the initial state's gradient.

With dnum_i = dy_i c_i and dden_i = -(dy_i . y_i) c_i, c_i = 1 / (den_i + epsilon) (1 and 0 without normalisation),

    dw_ij = dnum_i . v_j + dden_i                ds_ij = dw_ij (1 + s_ij) / sqrt(f)
    dq_i = sum_j ds_ij k_j + J(q_i)^T S [dnum_i, dden_i]             S the state before the chunk, j <= i in the chunk
    dk_j = sum_i ds_ij q_i + J(k_j)^T D [v_j, 1]                     D the cotangent of the state after the chunk, i >= j
    dv_j = sum_i w_ij dnum_i + D^T phi(k_j)
    D   += phi(q_i) [dnum_i, dden_i]^T                               walking back

J^T is the derivative of the features: that of the product x_i x_(i+r) with respect to its first factor is added as it is, that
with respect to its second is rolled back, by a product with the transposed matrix of rolls.

The states S are computed again rather than stored: for 64 tokens one would be as many bytes as everything else. The factors
c_i multiply rows or columns of products in float32, so that dy is read as it is. With more value columns than one CTA has, dq
and dk are sums over CTAs, to which only the first adds the terms of the denominator.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.based import gpu_call, gpu_carry
from pallas_kernels.based import gpu_parts as parts
from pallas_kernels.based.gpu_call import Frame
from pallas_kernels.based.gpu_layout import ADDS, CHUNK, READS, SLAB, WORKERS, Plan

F32 = jnp.float32
HALF = CHUNK // 2


def _scratch(plan: Plan, workers: int) -> dict[str, Any]:
    F, n, stages, dtype = plan.width, plan.tile, plan.stages, plan.dtype
    return dict(
        dy=parts.swizzled(n, (stages, CHUNK, n), dtype),
        scales=plgpu.SMEM((stages, 2, CHUNK), F32),
        # Score gradients first, then the slabs of the derivative of the features; in turns.
        grads=parts.swizzled(F, (workers, 2, CHUNK, SLAB), dtype),
        narrow=parts.swizzled(F, (workers, CHUNK, F), _partial(plan)),
    )


def _partial(plan: Plan) -> Any:
    """dq and dk that are still to be summed over CTAs stay float32."""
    return plan.dtype if plan.tiles == 1 and plan.h == plan.g else F32


def queries(
    plan: Plan, q: Any, k: Any, v: Any, dy: Any, scales: Any, info: Any, state: Any
) -> list[jax.Array]:
    """[dq [tiles, b, t, h, F]]. scales: [b, h, chunks, 2, 64], c and dden of each token."""
    values, denominator = (None, None) if state is None else state
    inputs = dict(q=q, k=k, v=v, dy=dy, scales=scales, info=info)
    inputs |= dict(state=values, denominator=denominator)
    shape = (plan.tiles, plan.b, plan.t, plan.h, plan.width)
    outputs = dict(dq=jax.ShapeDtypeStruct(shape, _partial(plan)))

    def body(m: Frame) -> None:
        def carry(state):
            issue = lambda i: gpu_call.load_chunk(plan, m, i, i)
            return gpu_carry.carry(plan, m, state, issue, **gpu_carry.keys_and_values(plan, m))

        gpu_call.walk(plan, m, carry, lambda _: None, [functools.partial(_dq, plan, m)])

    return gpu_call.launch(plan, body, inputs, outputs, _scratch(plan, WORKERS))


def _dq(plan: Plan, m: Frame, mine: Any, i: Any) -> None:
    half, slot = lax.rem(i, 2), lax.rem(i, plan.stages)
    plgpu.barrier_wait(m.full.at[slot])
    plgpu.barrier_wait(m.ready.at[half])
    q, k, v, dy = (ref.at[slot] for ref in (m.q, m.k, m.v, m.dy))
    info = m.info.at[slot] if plan.segmented else None
    only = gpu_carry.masked(plan, m, READS)(slot)
    c, dden = (parts.load(m.scales.at[slot, j], parts.ROW) for j in (0, 1))
    dden = dden * (m.tile == 0).astype(F32)

    def body(dq):
        s, dw = parts.products((q, parts.transposed(k)), (dy, parts.transposed(v)))
        s = s * plan.f**-0.5
        dw = dw * parts.rows(c, CHUNK) + parts.rows(dden, CHUNK)
        ds = jnp.where(parts.visible(m.positions, info), dw * (1 + s) * plan.f**-0.5, 0.0)
        m.grads.at[mine, 0][...] = ds.astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.wgmma(dq, m.grads.at[mine, 0], k)
        x = parts.tokens(q, None)
        inside = (c, dden) if only is None else (c * only, dden * only)
        direct = _through_features(plan, m, mine, half, q, x, dy, inside, dq, True)
        return parts.read(dq) + direct

    dq = pl.run_scoped(body, parts.ACC((CHUNK, plan.width)))
    plgpu.barrier_arrive(m.done.at[half])
    here = pl.ds(i * CHUNK, CHUNK)
    _leave(plan, m, mine, dq, m.gmem["dq"].at[m.tile, m.row, here, m.head])


def _through_features(
    plan: Plan,
    m: Frame,
    mine: Any,
    half: Any,
    x_ref: Any,
    x: jax.Array,
    right: Any,
    scales: tuple[jax.Array | None, jax.Array | None],
    rolled_back: Any,
    weighted: bool,
) -> jax.Array:
    """J(x)^T of the published state times [right * scales[0], scales[1]]: one part is returned, one added to `rolled_back`."""
    F = plan.width
    direct = parts.zeros(F)
    for s in range(plan.slabs):
        rolled = parts.roll(x_ref, m.rolls, plan, plan.of_slab(s))
        products = []
        # By halves of a slab: their products take no longer than one with the whole, and half of the registers.
        for groups in plan.halves(s):
            wanted = [group for group in groups if group <= plan.rolls]
            if not wanted:
                continue
            here = pl.ds((wanted[0] - s * plan.groups) * F, len(wanted) * F)
            state = parts.transposed(m.states.at[half, s, here])
            [gradient] = parts.products((right, state))
            for j, group in enumerate(wanted):
                dphi = _scaled(gradient[:, j * F : (j + 1) * F], scales[0])
                dphi += _scaled(parts.denominators(m, half, plan, group), scales[1])
                if weighted:
                    dphi = dphi * plan.weights[group]
                if group < plan.rolls:
                    direct += dphi * rolled[group - s * plan.groups]
                    products.append((dphi * x).astype(plan.dtype))
                else:
                    direct += dphi
        if products:
            buffer = m.grads.at[mine, (s + 1) % 2, :, pl.ds(0, len(products) * F)]
            buffer[...] = parts.side_by_side(products, plan.dtype)
            plgpu.commit_smem()
            matrix = m.rolls.at[:, pl.ds(s * SLAB, len(products) * F)]
            plgpu.wgmma(rolled_back, buffer, parts.transposed(matrix))
    return direct


def _scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    return x if scale is None else x * parts.rows(scale, x.shape[1])


def keys(
    plan: Plan, q: Any, k: Any, v: Any, dy: Any, scales: Any, cotangents: Any, info: Any, state: Any
) -> list[jax.Array]:
    """dk [tiles, b, t, h, F], dv [b, t, h, V], and the cotangent of the initial state.

    One for each query head; the sum over a group is the caller's. cotangents: [b, h, chunks, 8, 64], -(dy . y) of each token in
    the first of eight rows. state: None, or the cotangent of the final state.
    """
    F, n, dtype = plan.width, plan.tile, plan.dtype
    values, denominator = (None, None) if state is None else state
    inputs = dict(q=q, k=k, v=v, dy=dy, scales=scales, cotangents=cotangents, info=info)
    inputs |= dict(state=values, denominator=denominator)
    outputs = dict(
        dk=jax.ShapeDtypeStruct((plan.tiles, plan.b, plan.t, plan.h, F), _partial(plan)),
        dv=jax.ShapeDtypeStruct((plan.b, plan.t, plan.h, plan.tiles * n), dtype),
        **gpu_call.state_outputs(plan, plan.h),
    )
    scratch = _scratch(plan, 1) | dict(
        cotangents=parts.swizzled(n, (plan.stages, 8, CHUNK), dtype),
        features=parts.swizzled(n, (1, 2, CHUNK, SLAB), dtype),
        out=parts.swizzled(n, (1, CHUNK, n), dtype),
    )

    def body(m: Frame) -> None:
        reads = gpu_carry.masked(plan, m, READS)

        def only(slot):
            c, mask = parts.load(m.scales.at[slot, 0], parts.ROW), reads(slot)
            return c if mask is None else c * mask

        def carry(state):
            return gpu_carry.carry(
                plan,
                m,
                state,
                issue=lambda i: gpu_call.load_chunk(plan, m, i, plan.chunks - 1 - i),
                operands=lambda slot: (m.q.at[slot], m.dy.at[slot], m.cotangents.at[slot]),
                only=only,
                weighted=True,
            )

        leave = lambda state: gpu_call.write_state(plan, m, m.head, state)
        work = [functools.partial(role, plan, m) for role in (_dv, _dk)]
        gpu_call.walk(plan, m, carry, leave, work)

    return gpu_call.launch(plan, body, inputs, outputs, scratch, together=True)


def _seen(plan: Plan, m: Frame, slot: Any, some: Any) -> jax.Array:
    """Whether the keys, the rows here, are seen by half of the queries."""
    info = m.info.at[slot] if plan.segmented else None
    return parts.visible(m.positions, info, keys_in_rows=some)


def _of_queries(m: Frame, slot: Any, which: int, some: Any) -> jax.Array:
    """c or dden of half of the queries, in every row."""
    return parts.columns(parts.load(m.scales.at[slot, which, some], parts.COLUMN))


HALVES = (pl.ds(0, HALF), pl.ds(HALF, HALF))


def _dv(plan: Plan, m: Frame, mine: Any, i: Any) -> None:
    half, slot = lax.rem(i, 2), lax.rem(i, plan.stages)
    plgpu.barrier_wait(m.full.at[slot])
    only = gpu_carry.masked(plan, m, ADDS)(slot)
    k, x = m.k.at[slot], parts.tokens(m.k.at[slot], only)

    def weights(some):
        [s] = parts.products((k, parts.transposed(m.q.at[slot, some])))
        s = s * plan.f**-0.5
        w = (1 + s * (1 + 0.5 * s)) * _of_queries(m, slot, 0, some)
        return jnp.where(_seen(plan, m, slot, some), w, 0.0).astype(plan.dtype)

    def body(dv):
        m.features.at[mine, 0][...] = parts.side_by_side([weights(x) for x in HALVES], plan.dtype)
        plgpu.commit_smem()
        plgpu.wgmma(dv, m.features.at[mine, 0], m.dy.at[slot])
        plgpu.barrier_wait(m.ready.at[half])
        for s in range(plan.slabs):
            rolled = parts.roll(k, m.rolls, plan, plan.of_slab(s))
            made = parts.features(x, rolled, only, plan, plan.of_slab(s), weighted=False)
            slab = m.features.at[mine, (s + 1) % 2]
            slab[...] = parts.side_by_side(made, plan.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(dv, slab, m.states.at[half, s])
        return parts.read(dv)

    dv = pl.run_scoped(body, parts.ACC((CHUNK, plan.tile)))
    plgpu.barrier_arrive(m.done.at[half])
    plgpu.wait_smem_to_gmem(0)
    m.out.at[mine][...] = dv.astype(plan.dtype)
    plgpu.commit_smem()
    here = pl.ds((plan.chunks - 1 - i) * CHUNK, CHUNK)
    to = m.gmem["dv"].at[m.row, here, m.head, pl.ds(m.column, plan.tile)]
    plgpu.copy_smem_to_gmem(m.out.at[mine], to)


def _dk(plan: Plan, m: Frame, mine: Any, i: Any) -> None:
    half, slot = lax.rem(i, 2), lax.rem(i, plan.stages)
    plgpu.barrier_wait(m.full.at[slot])
    only = gpu_carry.masked(plan, m, ADDS)(slot)
    first = (m.tile == 0).astype(F32)

    def score_gradients(some):
        q, dy = (parts.transposed(ref.at[slot, some]) for ref in (m.q, m.dy))
        s, dw = parts.products((m.k.at[slot], q), (m.v.at[slot], dy))
        dw = dw * _of_queries(m, slot, 0, some) + _of_queries(m, slot, 1, some) * first
        ds = dw * (1 + s * plan.f**-0.5) * plan.f**-0.5
        return jnp.where(_seen(plan, m, slot, some), ds, 0.0).astype(plan.dtype)

    def body(dk):
        ds = [score_gradients(some) for some in HALVES]
        m.grads.at[mine, 0][...] = parts.side_by_side(ds, plan.dtype)
        plgpu.commit_smem()
        plgpu.wgmma(dk, m.grads.at[mine, 0], m.q.at[slot])
        plgpu.barrier_wait(m.ready.at[half])
        k, v, x = m.k.at[slot], m.v.at[slot], parts.tokens(m.k.at[slot], only)
        ones = plgpu.layout_cast(jnp.ones(CHUNK, F32), parts.ROW) if only is None else only
        direct = _through_features(
            plan, m, mine, half, k, x, v, (only, ones * first), dk, weighted=False
        )
        return parts.read(dk) + direct

    dk = pl.run_scoped(body, parts.ACC((CHUNK, plan.width)))
    plgpu.barrier_arrive(m.done.at[half])
    here = pl.ds((plan.chunks - 1 - i) * CHUNK, CHUNK)
    _leave(plan, m, mine, dk, m.gmem["dk"].at[m.tile, m.row, here, m.head])


def _leave(plan: Plan, m: Frame, mine: Any, x: jax.Array, to: Any) -> None:
    """dq or dk of a chunk to device memory."""
    plgpu.wait_smem_to_gmem(0)
    m.narrow.at[mine][...] = x.astype(_partial(plan))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(m.narrow.at[mine], to)
