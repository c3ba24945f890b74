"""The forward TPU kernel.

Grid (batch row, block of heads, block of tokens); the last axis is walked in order and carries S^T [V1, E] in VMEM. For a
chunk of C tokens, with tokens on lanes (columns):

    P^T = mask (1 + s + s^2/2),  s = k^T q / sqrt(f)                        [C, C]
    [num; den] = [v; 1] P^T + S^T phi(q),       S^T += [v; 1] phi(k)^T      [V1, C], [V1, E]

Features live in registers and VMEM only; q, k, v and y cross HBM once. A head and a chunk are a chain of dependent
products, so several of them are written out stage by stage: the scheduler keeps the order of the program, and fills the
wait for one product with another (143 cycles for 128 tokens of a head in v5e's
schedule, where one by one has 242).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.based.tpu_call import Call
from pallas_kernels.based.tpu_layout import CHUNK, Plan
from pallas_kernels.based.tpu_tiles import (
    chunks_of,
    dot,
    features,
    for_each,
    read_keys,
    tile,
    weights_of,
)


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array | None,
    ids: jax.Array | None,
    plan: Plan,
    normalize: bool,
    epsilon: float,
) -> dict[str, jax.Array]:
    """q [b, h, F, T], k [b, g, F, T], v [b, g, V, T], S^T before [b, g, V1, E] or None.

    Returns y [b, h, V, T], den [b, h, 1, T] and S^T after.
    """
    call = Call("based_forward", plan)
    call.tokens("q", q, plan.heads)
    call.tokens("k", k, plan.groups)
    call.tokens("v", v, plan.groups)
    call.segments(ids)
    if state is not None:
        call.state("before", state)
    call.tokens_out("y", plan.dtype, plan.heads, plan.V)
    call.tokens_out("den", jnp.float32, plan.heads, 1)
    call.state_out("after", (plan.V1, plan.E))
    call.scratch(state=((plan.groups, plan.V1, plan.E), jnp.float32))
    inner = CHUNK * (plan.F + plan.V1) + plan.E * plan.V1
    call.flops(2 * plan.b * plan.t * (plan.h * inner + plan.g * plan.E * plan.V1))
    return call.run(functools.partial(_kernel, plan=plan, normalize=normalize, epsilon=epsilon))


def _kernel(given, out, scratch, *, plan: Plan, normalize: bool, epsilon: float):
    state, f, V = scratch["state"], plan.f, plan.V
    step = pl.program_id(2)
    chunks = chunks_of(given, plan, step)

    @pl.when(step == 0)
    def _():
        state[...] = given["before"][0] if "before" in given else jnp.zeros_like(state)

    def some_groups(groups):
        keys = read_keys(given, groups, chunks)
        add = lambda k, v1: dot(v1, features(k, f), (1, 1))
        before = keys.advance(state, add, plan.dtype)

        def some_heads(members):
            units = keys.units(members, plan.shared)
            queries = [tile(given["q"], u.head, u.chunk) for u in units]
            scores = [dot(keys.k[u.n], q, (0, 0)) for u, q in zip(units, queries)]
            weights = [weights_of(d, f, u.chunk.seen, plan.dtype) for u, d in zip(units, scores)]
            inside = [dot(keys.v1[u.n], w) for u, w in zip(units, weights)]
            phis = [features(q, f) for q in queries]
            for u, x, phi in zip(units, inside, phis):
                write(u, x + u.chunk.readers(dot(before[u.n], phi)))

        for_each(plan.shared, plan.members_together, some_heads)

    def write(u, x):
        num, den = x[:V], x[V : V + 1]
        out["den"][0, u.head, :, u.chunk.lanes] = den
        if normalize:
            num = num * u.chunk.inverse(den, epsilon)
        out["y"][0, u.head, :, u.chunk.lanes] = num.astype(plan.dtype)

    for_each(plan.groups, plan.groups_together, some_groups)

    @pl.when(step == plan.steps - 1)
    def _():
        out["after"][0] = state[...]
