"""The backward TPU kernels: two sweeps, each of which recomputes what it needs from q, k and v.

With [dnum; dden] the cotangents of numerator and denominator, P = 1 + s + s^2/2, ds = [v; 1]^T [dnum; dden] (1 + s)/sqrt(f)
where the query sees the key, and J(x) the derivative of the features:

    forwards, S carried:     dq = k ds + J(q)^T (S [dnum; dden])
    backwards, dS carried:   dk = q ds^T + J(k)^T (dS [v; 1])        dv = dnum P + dS^T phi(k)
                             dS += phi(q) [dnum; dden]^T

The first sweep also forms [dnum; dden] from y, and leaves dden to the second. Per token and head of f = 16, v = 64 in
bfloat16 the two move 976 bytes. One sweep with the states of the blocks stored would move 1,380: a pass over k and v that
writes a float32 state per block, and the sweep that reads it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.based.tpu_call import Call
from pallas_kernels.based.tpu_layout import CHUNK, Plan
from pallas_kernels.based.tpu_tiles import (
    accumulate,
    chunks_of,
    dot,
    features,
    features_transposed,
    for_each,
    read_keys,
    scores_transposed,
    tile,
    weights_of,
    with_row,
)


def forwards(q, k, v, outputs, dy, state, ids, plan: Plan, epsilon: float) -> dict[str, jax.Array]:
    """dq [b, h, F, T] and, if outputs are normalised, dden [b, h, 1, T].

    Tokens last in all; outputs y [b, h, V, T] and den [b, h, 1, T], or None where they are not normalised; state
    S [b, g, E, V1] before the first token, or None.
    """
    call = Call("based_backward_q", plan)
    call.tokens("q", q, plan.heads)
    call.tokens("k", k, plan.groups)
    call.tokens("v", v, plan.groups)
    call.tokens("dy", dy, plan.heads)
    if outputs is not None:
        call.tokens("y", outputs[0], plan.heads)
        call.tokens("den", outputs[1], plan.heads)
    call.segments(ids)
    if state is not None:
        call.state("before", state)
    call.tokens_out("dq", plan.dtype, plan.heads, plan.F)
    if outputs is not None:
        call.tokens_out("dden", jnp.float32, plan.heads, 1)
    call.scratch(state=((plan.groups, plan.E, plan.V1), jnp.float32))
    inner = CHUNK * (2 * plan.F + plan.V1) + plan.E * plan.V1
    call.flops(2 * plan.b * plan.t * (plan.h * inner + plan.g * plan.E * plan.V1))
    return call.run(functools.partial(_forwards, plan=plan, epsilon=epsilon))


def backwards(
    q, k, v, rows, dy, dstate, ids, plan: Plan, epsilon: float, wants_state: bool
) -> dict[str, jax.Array]:
    """dk [b, g, F, T], dv [b, g, V, T] and, if wanted, the cotangent dS [b, g, E, V1] of the state before the first token.

    rows: den and dden, or None where outputs are not normalised; dstate: the cotangent of the state after the last token,
    or None.
    """
    call = Call("based_backward_kv", plan, reverse=True)
    call.tokens("q", q, plan.heads)
    call.tokens("k", k, plan.groups)
    call.tokens("v", v, plan.groups)
    call.tokens("dy", dy, plan.heads)
    if rows is not None:
        call.tokens("den", rows[0], plan.heads)
        call.tokens("dden", rows[1], plan.heads)
    call.segments(ids)
    if dstate is not None:
        call.state("after", dstate)
    call.tokens_out("dk", plan.dtype, plan.groups, plan.F)
    call.tokens_out("dv", plan.dtype, plan.groups, plan.V)
    if wants_state:
        call.state_out("before", (plan.E, plan.V1))
    call.scratch(state=((plan.groups, plan.E, plan.V1), jnp.float32))
    inner = CHUNK * (2 * plan.F + plan.V + plan.V1) + plan.E * plan.V1
    call.flops(2 * plan.b * plan.t * (plan.h * inner + 2 * plan.g * plan.E * plan.V1))
    return call.run(functools.partial(_backwards, plan=plan, epsilon=epsilon))


def _forwards(given, out, scratch, *, plan: Plan, epsilon: float):
    state, f = scratch["state"], plan.f
    step = pl.program_id(2)
    chunks = chunks_of(given, plan, step)

    @pl.when(step == 0)
    def _():
        state[...] = given["before"][0] if "before" in given else jnp.zeros_like(state)

    def cotangent(u):
        """[dnum; dden]; dden is written for the other sweep."""
        dy, dden = tile(given["dy"], u.head, u.chunk).astype(jnp.float32), jnp.float32(0)
        if "y" in given:
            dy = dy * u.chunk.inverse(tile(given["den"], u.head, u.chunk), epsilon)
            y = tile(given["y"], u.head, u.chunk).astype(jnp.float32)
            dden = -jnp.sum(dy * y, axis=0, keepdims=True)
            out["dden"][0, u.head, :, u.chunk.lanes] = dden
        return with_row(dy, dden).astype(plan.dtype)

    def some_groups(groups):
        keys = read_keys(given, groups, chunks)
        add = lambda k, v1: dot(features(k, f), v1, (1, 1))
        before = keys.advance(state, add, plan.dtype)

        def some_heads(members):
            units = keys.units(members, plan.shared)
            queries = [tile(given["q"], u.head, u.chunk) for u in units]
            scores = [dot(keys.k[u.n], q, (0, 0)) for u, q in zip(units, queries)]
            douts = [cotangent(u) for u in units]
            dweights = [dot(keys.v1[u.n], d, (0, 0)) for u, d in zip(units, douts)]
            dphis = [dot(before[u.n], d) for u, d in zip(units, douts)]
            dscores = [
                scores_transposed(dw, d, f, u.chunk.seen).astype(plan.dtype)
                for u, dw, d in zip(units, dweights, scores)
            ]
            inside = [dot(keys.k[u.n], ds) for u, ds in zip(units, dscores)]
            for u, q, dq, dphi in zip(units, queries, inside, dphis):
                dq = dq + u.chunk.readers(features_transposed(q, dphi, f))
                out["dq"][0, u.head, :, u.chunk.lanes] = dq.astype(plan.dtype)

        for_each(plan.shared, plan.members_together, some_heads)

    for_each(plan.groups, plan.groups_together, some_groups)


def _backwards(given, out, scratch, *, plan: Plan, epsilon: float):
    state, f, V = scratch["state"], plan.f, plan.V
    step = pl.program_id(2)
    chunks = chunks_of(given, plan, plan.steps - 1 - step)

    @pl.when(step == 0)
    def _():
        state[...] = given["after"][0] if "after" in given else jnp.zeros_like(state)

    def cotangent(u):
        """[dnum; dden], dden from the other sweep."""
        dy, dden = tile(given["dy"], u.head, u.chunk).astype(jnp.float32), jnp.float32(0)
        if "den" in given:
            dy = dy * u.chunk.inverse(tile(given["den"], u.head, u.chunk), epsilon)
            dden = tile(given["dden"], u.head, u.chunk)
        return with_row(dy, dden).astype(plan.dtype)

    def some_groups(groups):
        keys = read_keys(given, groups, chunks)

        def some_heads(members, sums):
            """Adds what these query heads give to dk, dv and dS, for every key/value head and chunk."""
            units = keys.units(members, plan.shared)
            queries = [tile(given["q"], u.head, u.chunk) for u in units]
            scores = [dot(keys.k[u.n], q, (0, 0)) for u, q in zip(units, queries)]
            douts = [cotangent(u) for u in units]
            dweights = [dot(keys.v1[u.n], d, (0, 0)) for u, d in zip(units, douts)]
            weights = [weights_of(d, f, u.chunk.seen, plan.dtype) for u, d in zip(units, scores)]
            dvs = [dot(d[:V], w, (1, 1)) for d, w in zip(douts, weights)]
            dscores = [
                scores_transposed(dw, d, f, u.chunk.seen).astype(plan.dtype)
                for u, dw, d in zip(units, dweights, scores)
            ]
            dks = [dot(q, ds, (1, 1)) for q, ds in zip(queries, dscores)]
            phis = [features(q, f) for q in queries]
            dstates = [
                dot(phi, u.chunk.readers(d), (1, 1)) for u, phi, d in zip(units, phis, douts)
            ]
            for u, *parts in zip(units, dks, dvs, dstates):
                sums[u.n] = parts if sums[u.n] is None else list(map(jnp.add, sums[u.n], parts))
            return sums

        shapes = ((plan.F, CHUNK), (plan.V, CHUNK), (plan.E, plan.V1))
        n = len(keys.k)
        if plan.shared == plan.members_together:
            sums = [None] * n
        else:
            sums = [[jnp.zeros(shape, jnp.float32) for shape in shapes] for _ in range(n)]
        sums = accumulate(plan.shared, plan.members_together, some_heads, sums)
        phis = [features(k, f) for k in keys.k]
        for i, group in enumerate(groups):
            after = state[group]
            for c, chunk in reversed(list(enumerate(chunks))):
                n = i * plan.chunks + c
                dk, dv, dstate = sums[n]
                rounded = after.astype(plan.dtype)
                dphi = chunk.stayers(dot(rounded, keys.v1[n]))
                dk = dk + features_transposed(keys.k[n], dphi, f)
                dv = dv + chunk.stayers(dot(rounded[:, :V], phis[n], (0, 0)))
                out["dk"][0, group, :, chunk.lanes] = dk.astype(plan.dtype)
                out["dv"][0, group, :, chunk.lanes] = dv.astype(plan.dtype)
                after = chunk.kept(after) + dstate
            state[group] = after

    for_each(plan.groups, plan.groups_together, some_groups)

    if "before" in out:

        @pl.when(step == plan.steps - 1)
        def _():
            out["before"][0] = state[...]
