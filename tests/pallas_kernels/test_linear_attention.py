"""`pallas_kernels.linear_attention` against the recurrence written out in float64 numpy.

Run: pytest tests/pallas_kernels/test_linear_attention.py
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.linear_attention import api, feature_maps, linear_attention
from pallas_kernels.linear_attention.shapes import TEST_SHAPES, Shape

# Chunks are what goes wrong: the other two forms run a shape of each kind.
RUNS = [(name, "chunked") for name in TEST_SHAPES]
RUNS += [(name, form) for name in ("retnet", "gla_grouped") for form in ("quadratic", "reference")]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that short tests cross chunk boundaries; a chunk of decay per channel is two of the blocks of `decay.py`."""
    monkeypatch.setattr(api, "CHUNK", 8)
    monkeypatch.setattr(api, "CHANNEL_CHUNK", 32)


class Given(NamedTuple):
    q: Any
    k: Any
    v: Any
    log_decay: Any
    state: Any
    ids: Any
    dy: Any
    dstate: Any


def given(shape: Shape, *, strongest=1.0, segments=False, normalize=False, seed=0) -> Given:
    """Positive q and k, so that denominators are; log decays between -strongest and 0."""
    rng = np.random.default_rng(seed)
    b, t, h, g, k, v, decay = shape
    size = {"head": (b, t, g), "channel": (b, t, g, k)}.get(decay)
    a = None if decay is None else -strongest * rng.random(size)
    w = v + normalize
    ids = None
    if segments:
        ids = 3 + np.cumsum(2 * (rng.random((b, t)) < 0.15), axis=1).astype(np.int32)
        ids[0, t - t // 4 :] = 0
    return Given(
        rng.random((b, t, h, k)),
        rng.random((b, t, g, k)),
        rng.normal(size=(b, t, g, v)),
        a,
        rng.random((b, g, k, w)),
        ids,
        rng.normal(size=(b, t, h, v)),
        rng.normal(size=(b, g, k, w)),
    )


def exact(given: Given, normalize=False, epsilon=1e-6):
    """y, final state and the gradients of sum(y dy) + sum(final dstate) to q, k, v, log_decay and the state, token by token."""
    q, k, v, log_decay, state, ids, dy, dstate = given
    b, t, h = q.shape[:3]
    g, r = k.shape[2], h // k.shape[2]
    v1 = np.concatenate([v, np.ones((b, t, g, 1))], -1) if normalize else v
    a = np.zeros_like(k) if log_decay is None else log_decay
    a = np.broadcast_to(a if a.ndim == 4 else a[..., None], k.shape)
    ids = np.ones((b, t), int) if ids is None else ids
    y, dq, dk, dv1, da = (np.zeros(x.shape) for x in (dy, q, k, v1, a))
    final, dbefore = np.zeros_like(state), np.zeros_like(state)
    for row in range(b):
        for head in range(g):
            group = slice(head * r, head * r + r)
            S, current, kept = state[row, head], ids[row, 0], []
            for i in range(t):
                before = S if ids[row, i] in (0, current) else np.zeros_like(S)
                if ids[row, i] == 0:
                    kept.append((before, S, None))
                    continue
                current = ids[row, i]
                S = np.exp(a[row, i, head])[:, None] * before + np.outer(
                    k[row, i, head], v1[row, i, head]
                )
                out = q[row, i, group] @ S
                dout = dy[row, i, group]
                if normalize:
                    den = out[:, -1:] + epsilon
                    out = out[:, :-1] / den
                    dout = np.concatenate([dout, -(dout * out).sum(1, keepdims=True)], 1) / den
                y[row, i, group] = out
                kept.append((before, S, dout))
            final[row, head] = S
            D = dstate[row, head]
            for i in reversed(range(t)):
                before, S, dout = kept[i]
                if dout is None:
                    continue
                D = D + q[row, i, group].T @ dout
                dq[row, i, group] = dout @ S.T
                dk[row, i, head] = D @ v1[row, i, head]
                dv1[row, i, head] = k[row, i, head] @ D
                D = D * np.exp(a[row, i, head])[:, None]
                da[row, i, head] = (D * before).sum(1)
                if i and ids[row, i] != ids[row, i - 1]:
                    D = np.zeros_like(D)
            dbefore[row, head] = D
    if log_decay is not None and log_decay.ndim == 3:
        da = da.sum(-1)
    return y, final, dq, dk, dv1[..., : v.shape[-1]], None if log_decay is None else da, dbefore


NAMES = ("y", "state", "dq", "dk", "dv", "dlog_decay", "dstate")


def run(given: Given, form: str, normalize=False):
    @jax.jit
    def results(given):
        def forward(q, k, v, a, state):
            return linear_attention(
                q,
                k,
                v,
                log_decay=a,
                initial_state=state,
                segment_ids=given.ids,
                normalize=normalize,
                implementation=form,
            )

        out, transposed = jax.vjp(forward, *given[:5])
        return *out, *transposed((given.dy.astype(out[0].dtype), given.dstate))

    return results(given)


def near(actual, wanted, tolerance, what=""):
    scale = max(np.abs(wanted).max(initial=0), 1e-30)  # float32 ends a little below
    difference = np.asarray(actual, np.float64) - wanted
    np.testing.assert_allclose(difference / scale, 0, atol=tolerance, err_msg=what)


def check(given, form, tolerance, normalize=False, dtype=None):
    cast = lambda x: x if x is None or x.dtype == np.int32 else jnp.asarray(x, dtype or np.float64)
    narrow = Given(*map(cast, given))
    exactly = Given(
        *(x if x is None or x.dtype == np.int32 else np.asarray(x, np.float64) for x in narrow)
    )
    poisoned = narrow
    if given.ids is not None:
        real = given.ids > 0
        nan = lambda x: (
            None
            if x is None
            else jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, np.nan)
        )
        poisoned = narrow._replace(
            **{x: nan(getattr(narrow, x)) for x in ("q", "k", "v", "log_decay")}
        )
    for what, a, w in zip(NAMES, run(poisoned, form, normalize), exact(exactly, normalize)):
        if w is not None:
            near(a, w, tolerance, what)


@pytest.mark.parametrize(("name", "form"), RUNS)
def test_outputs_state_and_gradients_are_those_of_the_recurrence(name, form):
    with jax.enable_x64(True):
        check(given(TEST_SHAPES[name]), form, 1e-12)
        check(given(TEST_SHAPES[name], segments=True, normalize=True), form, 1e-12, normalize=True)


@pytest.mark.parametrize("form", ["quadratic", "chunked"])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("strongest", [20.0, 300.0])
def test_strong_decay_needs_no_large_numbers(decay, strongest, form):
    """In float32 exp(20 x 8 tokens) would overflow; the error of a prefix sum of -20 a token would be 1e-4."""
    data = given(Shape(1, 70, 1, 1, 4, 3, decay), strongest=strongest)
    gentle = np.random.default_rng(1).random(data.log_decay.shape) < 0.5
    check(
        data._replace(log_decay=np.where(gentle, 0.01 * data.log_decay, data.log_decay)),
        form,
        2e-6,
        dtype=np.float32,
    )


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_forgetting_everything_is_a_log_decay_of_minus_infinity(decay):
    data = given(Shape(1, 40, 2, 2, 4, 3, decay))
    data.log_decay[:, ::7] = -np.inf
    with jax.enable_x64(True):
        check(data, "chunked", 1e-12)


@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_a_long_gentle_sum_stays_exact(decay, monkeypatch):
    """2,000 tokens with decays near 0 (-1e-4): about 2^-24 times the root of the number of terms."""
    monkeypatch.setattr(api, "CHUNK", 128)
    monkeypatch.setattr(api, "CHANNEL_CHUNK", 64)
    data = given(Shape(1, 2000, 1, 1, 4, 2, decay), strongest=1e-4)
    check(data, "chunked", 5e-6, dtype=np.float32)


def test_bfloat16_error_is_that_of_its_inputs():
    data = given(TEST_SHAPES["retnet"])
    cast = lambda x: jnp.asarray(x, jnp.bfloat16)
    narrow = [cast(x) for x in data[:3]]
    y, state = linear_attention(*narrow, log_decay=jnp.asarray(data.log_decay, jnp.float32))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    wide = data._replace(q=narrow[0], k=narrow[1], v=narrow[2], state=np.zeros_like(data.state))
    wide = Given(*(None if x is None else np.asarray(x, np.float64) for x in wide))
    near(y, exact(wide._replace(ids=None))[0], 2e-2)  # two roundings to 2^-9, of weights and result


def test_pieces_with_their_states_are_the_whole():
    @jax.jit
    def whole(q, k, v, a):
        return linear_attention(q, k, v, log_decay=a, implementation="chunked")

    @jax.jit
    def in_pieces(*arrays):
        state, ys = None, []
        for piece in (slice(0, 19), slice(19, 20), slice(20, None)):
            q, k, v, a = (x[:, piece] for x in arrays)
            y, state = linear_attention(q, k, v, log_decay=a, initial_state=state)
            ys.append(y)
        return jnp.concatenate(ys, axis=1), state

    data = given(TEST_SHAPES["gla"])
    with jax.enable_x64(True):
        for actual, wanted in zip(in_pieces(*data[:4]), whole(*data[:4])):
            near(actual, np.asarray(wanted), 1e-12)


@pytest.mark.parametrize("name", ["retnet", "gla"])
def test_vmap_checkpoint_and_scan_change_nothing(name):
    data = given(TEST_SHAPES[name])
    arrays = tuple(x for x in data[:4] if x is not None)

    def gradient(*arrays):
        a = arrays[3] if len(arrays) > 3 else None
        f = lambda q, k, v: linear_attention(q, k, v, log_decay=a, implementation="chunked")[0]
        y, transposed = jax.vjp(jax.checkpoint(f), *arrays[:3])
        return transposed(y)

    with jax.enable_x64(True):
        plain = jax.jit(gradient)(*arrays)
        twice = [jnp.stack([x, x]) for x in arrays]
        mapped = jax.jit(jax.vmap(gradient))(*twice)
        scanned = jax.jit(lambda *xs: jax.lax.scan(lambda c, x: (c, gradient(*x)), 0, xs)[1])(
            *twice
        )
        for p, m, s in zip(plain, mapped, scanned):
            near(m[1], np.asarray(p), 1e-12)
            near(s[1], np.asarray(p), 1e-12)


@pytest.mark.parametrize("name", ["retnet", "gla"])
def test_second_derivatives_are_those_of_the_reference(name):
    data = given(TEST_SHAPES[name]._replace(t=20))
    arrays = tuple(x for x in data[:4] if x is not None)

    def curvature(form):
        def loss(arrays):
            a = arrays[3] if len(arrays) > 3 else None
            y, state = linear_attention(*arrays[:3], log_decay=a, implementation=form)
            return jnp.sum(jnp.sin(y)) + jnp.sum(state**2)

        inner = lambda arrays: sum(jnp.sum(jnp.cos(x) * x) for x in jax.grad(loss)(arrays))
        return jax.jit(jax.grad(inner))(arrays)

    with jax.enable_x64(True):
        for a, w in zip(curvature("chunked"), curvature("reference")):
            near(a, np.asarray(w), 1e-11)


def test_reruns_are_bitwise_equal():
    data = given(TEST_SHAPES["gla"])
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), data)
    chex.assert_trees_all_equal(run(data, "chunked"), run(data, "chunked"))


def test_memory_holds_no_state_per_token(monkeypatch):
    monkeypatch.setattr(api, "CHUNK", 128)

    def temporaries(t):
        sizes = [(1, t, 1, 64)] * 3 + [(1, t, 1)]
        args = [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]
        f = lambda q, k, v, a: linear_attention(q, k, v, log_decay=a, implementation="chunked")[
            0
        ].sum()
        program = jax.jit(jax.grad(f, (0, 1, 2, 3))).lower(*args).compile()
        return program.memory_analysis().temp_size_in_bytes

    small, large = temporaries(2048), temporaries(4096)
    assert large <= 2.1 * small
    assert large / 4096 < 64 * 64 * 4 / 4  # a state per token would be 64 x 64 floats


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=np.zeros((1, 4, 1, 3))), "do not fit"),
        (
            dict(q=np.zeros((1, 4, 3, 2)), k=np.zeros((1, 4, 2, 2)), v=np.zeros((1, 4, 2, 2))),
            "share",
        ),
        (dict(log_decay=np.zeros((1, 3, 1))), "log_decay is"),
        (dict(log_decay=np.full((1, 4, 1), 0.5)), "largest value is 0.5"),
        (dict(initial_state=np.zeros((1, 1, 5, 3))), "initial_state"),
        (dict(segment_ids=np.zeros((1, 5), np.int32)), "segment_ids"),
        (dict(segment_ids=np.array([[2, 2, 1, 0]], np.int32)), "row 0 goes from 2 to 1 at token 2"),
        (dict(segment_ids=np.array([[1, 0, 1, 0]], np.int32)), "after all others"),
        (dict(implementation="triton"), "reference, quadratic, chunked"),
    ],
)
def test_bad_arguments_are_named(change, message, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # else the annotations speak first
    good = dict(q=np.zeros((1, 4, 1, 2)), k=np.zeros((1, 4, 1, 2)), v=np.zeros((1, 4, 1, 2)))
    with pytest.raises(ValueError, match=message):
        linear_attention(**(good | change))


@pytest.mark.parametrize("name", ["identity", "elu_plus_one", "relu", "squared_relu"])
def test_simple_feature_maps(name):
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    wanted = {
        "identity": x,
        "elu_plus_one": np.where(x > 0, x + 1, np.exp(x)),
        "relu": np.maximum(x, 0),
        "squared_relu": np.maximum(x, 0) ** 2,
    }[name]
    near(getattr(feature_maps, name)(jnp.asarray(x)), wanted, 1e-6)


def test_cosformer_weighs_by_the_cosine_of_the_distance():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 6, 1, 3))
    positions = jnp.arange(6)[None]
    with jax.enable_x64(True):
        phi = [
            np.asarray(feature_maps.cosformer(jnp.asarray(x), positions, 6))[0, :, 0]
            for x in (q, k)
        ]
    i = np.arange(6)
    cosine = np.cos(np.pi * (i[:, None] - i) / 12)
    relu = [np.maximum(x[0, :, 0], 0) for x in (q, k)]
    near(phi[0] @ phi[1].T, relu[0] @ relu[1].T * cosine, 1e-12)


def test_performer_estimates_the_softmax_kernel_with_orthogonal_directions():
    f, m = 8, 4096
    w = np.asarray(feature_maps.performer_projection(jax.random.key(0), f, m), np.float64)
    block = w[:, :f] / np.linalg.norm(w[:, :f], axis=0)
    near(block.T @ block, np.eye(f), 1e-5)
    rng = np.random.default_rng(1)
    q, k = 0.5 * rng.normal(size=(2, 3, f))
    raw = feature_maps.performer(
        jnp.asarray(q, jnp.float32), jnp.asarray(w, jnp.float32), query=False
    )
    keys = feature_maps.performer(
        jnp.asarray(k, jnp.float32), jnp.asarray(w, jnp.float32), query=False
    )
    # the deviation of a mean of 4,096 terms of size about 1
    near(np.asarray(raw) @ np.asarray(keys).T, np.exp(q @ k.T / np.sqrt(f)), 0.1)
    stable = feature_maps.performer(
        jnp.asarray(q, jnp.float32), jnp.asarray(w, jnp.float32), query=True
    )
    ratio = np.asarray(stable) / np.asarray(raw)
    near(ratio / ratio[:, :1], np.ones_like(ratio), 1e-4)
