"""What every implementation of `pallas_kernels.based` must do, against sums written out in float64 numpy.

A test file of an implementation is thin: it names an `Op`, its cases and its tolerances, and calls the checks below.

    op = functools.partial(based, implementation="tpu")         # or `contract_op(tpu.forward, tpu.backward)`
    @pytest.mark.parametrize("name", law.CASES)
    def test_numbers(name): law.check_numbers(op, law.CASES[name], np.float32, law.FLOAT32)

`exact` holds the maths once more, in numpy and with every pair of tokens, so that no line of the library is its own judge;
`test_based.py` compares its gradients with finite differences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

Op = Callable[
    ..., Any
]  # op(q, k, v, *, initial_state, segment_ids, normalize, epsilon) -> y, state

# Errors, relative to the largest magnitude of the exact array.
FLOAT64 = 1e-11
# 2^-24 times the root of a few hundred terms; gradients through a denominator add a factor of two or three.
FLOAT32 = 5e-6
# 2^-9 for every rounding to 8 bits: weights, features, cotangents, the result itself.
BFLOAT16 = 2e-2


class Case(NamedTuple):
    """b rows of t tokens, h query heads on g key/value heads, widths f and v."""

    b: int
    t: int
    h: int
    g: int
    f: int
    v: int
    segments: bool = False
    state: bool = True
    normalize: bool = True


def cases(length: int) -> dict[str, Case]:
    """The widths of the issue at about `length` tokens: odd ones, so that chunks end anywhere."""
    t = length
    return {
        "paper": Case(1, t + 1, 2, 2, 16, 64),
        "packed": Case(2, t, 1, 1, 16, 64, segments=True),
        "numerator": Case(1, t - 3, 1, 1, 16, 64, normalize=False),
        "no_state": Case(1, t, 1, 1, 8, 16, state=False),
        "f4_v16_grouped": Case(2, t, 4, 2, 4, 16, segments=True),
        "f8_v80": Case(1, t + 2, 1, 1, 8, 80),
        "f16_v112": Case(1, t, 2, 1, 16, 112),
        "f24_v128": Case(1, t - 2, 1, 1, 24, 128, segments=True),
        "f32_v128": Case(1, t, 1, 1, 32, 128),
        "one_token": Case(2, 1, 2, 1, 16, 64),
        "packed_no_state": Case(2, t, 1, 1, 8, 64, segments=True, state=False, normalize=False),
    }


CASES = cases(37)


class Arguments(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    state: np.ndarray | None
    ids: np.ndarray | None
    dy: np.ndarray
    dstate: np.ndarray


class Results(NamedTuple):
    y: Any
    state: Any
    dq: Any
    dk: Any
    dv: Any
    dstate: Any  # of the initial state; None where there is none


def arguments(case: Case, seed: int = 0) -> Arguments:
    """Random float64 arrays. The state comes from real keys: a random one could make denominators vanish."""
    rng = np.random.default_rng(seed)
    b, t, h, g, f, v = case[:6]
    q, k, values = (rng.normal(size=size) for size in ((b, t, h, f), (b, t, g, f), (b, t, g, v)))
    before_k, before_v = rng.normal(size=(b, 9, g, f)), rng.normal(size=(b, 9, g, v))
    before = np.concatenate([before_v, np.ones((b, 9, g, 1))], axis=-1)
    state = np.einsum("btge,btgv->bgev", features(before_k), before)
    dy, dstate = rng.normal(size=(b, t, h, v)), rng.normal(size=state.shape)
    return Arguments(
        q, k, values, state if case.state else None, segments_of(case, seed), dy, dstate
    )


def segments_of(case: Case, seed: int = 0) -> np.ndarray | None:
    """Ids that skip numbers, one row padded, one (of two) wholly real; None for a case without segments."""
    if not case.segments:
        return None
    rng = np.random.default_rng(seed + 1)
    ids = 3 + np.cumsum(2 * (rng.random((case.b, case.t)) < 0.15), axis=1)
    ids[0, case.t - case.t // 4 :] = 0
    return ids.astype(np.int32)


def features(x: np.ndarray) -> np.ndarray:
    """phi(x), feature by feature in the packed layout."""
    f = x.shape[-1]
    left, right, weight = _pairs(f)
    parts = [np.ones(x.shape[:-1] + (1,)), x / f**0.25, weight * x[..., left] * x[..., right]]
    return np.concatenate(parts, axis=-1)


def _pairs(f: int):
    """x_i x_(i-r), r = 0 .. f/2, the last r of an even f cut in half; squares weigh 1/sqrt(2f), products 1/sqrt(f)."""
    pairs = [
        (i, (i - r) % f, (2 * f if r == 0 else f) ** -0.5)
        for r in range(f // 2 + 1)
        for i in range(f // 2 if f % 2 == 0 and r == f // 2 else f)
    ]
    left, right, weight = zip(*pairs)
    return np.array(left), np.array(right), np.array(weight)


def _features_transposed(x: np.ndarray, dphi: np.ndarray) -> np.ndarray:
    """The gradient of features(x) . dphi."""
    f = x.shape[-1]
    left, right, weight = _pairs(f)
    dx = dphi[..., 1 : 1 + f] / f**0.25
    for m, (i, j, w) in enumerate(zip(left, right, weight)):
        d = dphi[..., 1 + f + m] * w
        dx[..., i] += d * x[..., j]
        dx[..., j] += d * x[..., i]
    return dx


def exact(arguments: Arguments, normalize: bool = True, epsilon: float = 1e-12) -> Results:
    """y_i = sum_j w_ij v_j / (sum_j w_ij + epsilon), w = 1 + s + s^2/2 over the visible j; and all gradients, by hand."""
    q, k, v, state, ids, dy, dstate = arguments
    b, t, h, f = q.shape
    g, r = k.shape[2], h // k.shape[2]
    if ids is None:
        ids = np.ones((b, t), np.int32)
    real = (ids > 0)[..., None, None]
    q, k, v, dy = (np.where(real, x, 0.0) for x in (q, k, v, dy))
    v1 = np.concatenate([v, np.broadcast_to(real, v.shape[:-1] + (1,))], axis=-1)
    K, V = np.repeat(k, r, axis=2), np.repeat(v1, r, axis=2)
    before = np.zeros((b, g, features(k).shape[-1], v1.shape[-1])) if state is None else state
    S = np.repeat(before, r, axis=1)

    seen = np.tri(t, dtype=bool) & (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] > 0)
    seen = seen[:, None]
    goes_on = ((ids == ids[:, :1]) & (ids > 0))[..., None, None]
    last = ids.max(axis=1, initial=0)
    in_last = ((ids == last[:, None]) & (ids > 0))[..., None, None]
    kept = (last == ids[:, 0])[:, None, None, None]

    s = np.einsum("bihf,bjhf->bhij", q, K) / np.sqrt(f)
    w = np.where(seen, 1 + s + s**2 / 2, 0)
    phi_q, phi_k = features(q) * goes_on, features(k) * in_last
    out = np.einsum("bhij,bjhv->bihv", w, V) + np.einsum("bihe,bhev->bihv", phi_q, S)
    num, den = out[..., :-1], out[..., -1:]
    final = np.einsum("bjge,bjgv->bgev", phi_k, v1) + kept * before
    y, dout = num, np.concatenate([dy, 0 * den], axis=-1)
    if normalize:
        den = np.where(real, den + epsilon, 1)
        y = num / den
        dout = np.concatenate([dy, -(dy * y).sum(-1, keepdims=True)], axis=-1) / den

    ds = np.where(seen, np.einsum("bihv,bjhv->bhij", dout, V), 0) * (1 + s) / np.sqrt(f)
    dq = np.einsum("bhij,bjhf->bihf", ds, K)
    dq += _features_transposed(q, np.einsum("bihv,bhev->bihe", dout, S) * goes_on)
    dk = np.einsum("bhij,bihf->bjhf", ds, q).reshape(b, t, g, r, f).sum(3)
    dk += _features_transposed(k, np.einsum("bgev,bjgv->bjge", dstate, v1) * in_last)
    dv1 = np.einsum("bhij,bihv->bjhv", w, dout).reshape(b, t, g, r, -1).sum(3)
    dv1 += np.einsum("bgev,bjge->bjgv", dstate, phi_k)
    dbefore = np.einsum("bihe,bihv->bhev", phi_q, dout)
    dbefore = dbefore.reshape(b, g, r, *dbefore.shape[2:]).sum(2) + kept * dstate
    dq, dk, dv = (np.where(real, x, 0) for x in (dq, dk, dv1[..., :-1]))
    return Results(np.where(real, y, 0), final, dq, dk, dv, None if state is None else dbefore)


def run(op: Op, given: Arguments, normalize: bool = True, epsilon: float = 1e-12) -> Results:
    """Outputs and every gradient of sum(y dy) + sum(final state dstate), in one compiled program."""
    return jax.jit(_results, static_argnums=(0, 2, 3))(op, given, normalize, epsilon)


def _results(op, given, normalize, epsilon):
    def forward(q, k, v, state):
        return op(
            q,
            k,
            v,
            initial_state=state,
            segment_ids=given.ids,
            normalize=normalize,
            epsilon=epsilon,
        )

    (y, final), transposed = jax.vjp(forward, given.q, given.k, given.v, given.state)
    gradients = transposed((given.dy.astype(y.dtype), given.dstate.astype(final.dtype)))
    return Results(y, final, *gradients)


def cast(given: Arguments, dtype) -> Arguments:
    """q, k, v and dy in `dtype`, the states in float32 or wider, all as jax arrays."""
    wide = jnp.promote_types(dtype, jnp.float32)
    kinds = Arguments(dtype, dtype, dtype, wide, jnp.int32, dtype, wide)
    return Arguments(
        *(None if x is None else jnp.asarray(x, kind) for x, kind in zip(given, kinds))
    )


def in_float64(given: Arguments) -> Arguments:
    """The same numbers for `exact`: rounded inputs stay rounded."""
    ids = None if given.ids is None else np.asarray(given.ids)
    widened = [None if x is None else np.asarray(x, np.float64) for x in given]
    return Arguments(*widened)._replace(ids=ids)


def poison(given: Any) -> Arguments:
    """NaN wherever a token is padding."""
    real = (given.ids > 0)[..., None, None]
    return given._replace(**{x: jnp.where(real, getattr(given, x), np.nan) for x in "qkv"})


def near(actual: Any, wanted: Any, tolerance: float, what: str = "") -> None:
    """|actual - wanted| <= tolerance times the largest magnitude of wanted."""
    scale = np.abs(wanted).max(initial=0) or 1.0
    np.testing.assert_allclose(
        np.asarray(actual, np.float64) / scale,
        np.asarray(wanted, np.float64) / scale,
        atol=tolerance,
        rtol=0,
        err_msg=what,
    )


def check_numbers(op: Op, case: Case, dtype: Any, tolerance: float, epsilon: float = 1e-12) -> None:
    """Outputs, final state and every gradient are the exact ones; padding holds NaN where the case has some."""
    given = cast(arguments(case), dtype)
    wanted = exact(in_float64(given), case.normalize, epsilon)
    actual = run(op, given if given.ids is None else poison(given), case.normalize, epsilon)
    assert actual.y.dtype == dtype
    assert actual.state.dtype == jnp.promote_types(dtype, jnp.float32)
    for what, a, w in zip(Results._fields, actual, wanted):
        if w is not None:
            near(a, w, tolerance, what)


def check_reruns(op: Op, case: Case, dtype: Any) -> None:
    """Two runs agree in every bit."""
    given = cast(arguments(case), dtype)
    chex.assert_trees_all_equal(run(op, given, case.normalize), run(op, given, case.normalize))


def check_cuts(op: Op, case: Case, dtype: Any, tolerance: float, cut: int) -> None:
    """The state of the first `cut` tokens, given to the rest, gives what one call gives."""
    given = in_float64(cast(arguments(case), dtype))
    wanted = exact(given, case.normalize)
    whole = cast(given, dtype)

    def part(where, state):
        ids = None if whole.ids is None else whole.ids[:, where]
        tokens = (x[:, where] for x in whole[:3])
        return op(*tokens, initial_state=state, segment_ids=ids, normalize=case.normalize)

    first, middle = part(slice(None, cut), whole.state)
    second, last = part(slice(cut, None), middle)
    near(np.concatenate([first, second], axis=1).astype(np.float64), wanted.y, tolerance, "y")
    near(last, wanted.state, tolerance, "state")


def check_transforms(op: Op, case: Case, dtype: Any, tolerance: float) -> None:
    """vmap, jit, checkpoint and a gradient inside a scan give the numbers of plain calls."""
    given = [cast(arguments(case, seed), dtype) for seed in (0, 1)]
    wanted = [exact(in_float64(one), case.normalize) for one in given]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *given)
    results = lambda one: _results(op, one, case.normalize, 1e-12)

    programs = {
        "vmap": jax.vmap(results),
        "scan": lambda xs: jax.lax.scan(lambda _, one: (None, results(one)), None, xs)[1],
    }
    for what, program in programs.items():
        actual = jax.jit(program)(stacked)
        for i, row in enumerate(wanted):
            for name, a, w in zip(Results._fields, actual, row):
                if w is not None:
                    near(a[i], w, tolerance, f"{what} {name}")

    def rematerialised(one):
        forward = lambda q, k, v, state: op(
            q, k, v, initial_state=state, segment_ids=one.ids, normalize=case.normalize
        )
        out, transposed = jax.vjp(jax.checkpoint(forward), *one[:4])
        return Results(*out, *transposed((one.dy.astype(out[0].dtype), one.dstate)))

    for name, a, w in zip(Results._fields, jax.jit(rematerialised)(given[0]), wanted[0]):
        if w is not None:
            near(a, w, tolerance, f"checkpoint {name}")


def contract_op(forward: Callable[..., Any], backward: Callable[..., Any]) -> Op:
    """The op made of an implementation's `forward` and `backward` alone, as `based` makes it, without its dispatch."""

    def op(q, k, v, *, initial_state=None, segment_ids=None, normalize=True, epsilon=1e-12):
        fixed = dict(normalize=normalize, epsilon=epsilon)
        real = None if segment_ids is None else (segment_ids > 0)[..., None, None]

        @jax.custom_vjp
        def call(q, k, v, state, ids):
            y, _, final = forward(q, k, v, state, ids, **fixed)
            return y, final

        def call_forward(q, k, v, state, ids):
            y, den, final = forward(q, k, v, state, ids, **fixed)
            return (y, final), (q, k, v, state, ids, y, den)

        def call_backward(kept, cotangents):
            *gradients, dstate = backward(*kept, *cotangents, **fixed)
            return *gradients, None if kept[3] is None else dstate, None

        call.defvjp(call_forward, call_backward)
        if real is not None:
            q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
        y, final = call(q, k, v, initial_state, segment_ids)
        return (y if real is None else jnp.where(real, y, 0)), final

    return op
