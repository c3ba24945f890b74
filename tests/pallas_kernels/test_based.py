"""`pallas_kernels.based` against sums written out in float64 numpy.

Run: pytest tests/pallas_kernels/test_based.py
"""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels.based as op
from pallas_kernels.based import chunked
from pallas_kernels.based.shapes import TEST_SHAPES, Shape

FORMS = ("reference", "quadratic", "chunked")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8, so that short tests cross chunk boundaries."""
    monkeypatch.setattr(chunked, "CHUNK", 8)


def arguments(shape: Shape, seed: int = 0, dtype=np.float64):
    """q, k, v in numpy; the op's jitted callers turn them into arrays."""
    rng = np.random.default_rng(seed)
    b, t, h, g, f, v = shape
    return tuple(
        rng.normal(size=size).astype(dtype) for size in ((b, t, h, f), (b, t, g, f), (b, t, g, v))
    )


def segments_of(shape: Shape, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((shape.b, shape.t)) < 0.2, axis=1) + 1
    for row, length in enumerate(rng.integers(0, shape.t + 1, shape.b)):
        ids[row, length:] = 0
    return ids.astype(np.int32)


def expected(q, k, v, ids=None, normalize=True):
    """y_i = sum_j w_ij v_j / sum_j w_ij, w = 1 + s + s^2/2 over the visible j, term by term."""
    b, t, h, f = q.shape
    y = np.zeros((b, t, h, v.shape[-1]))
    for row in range(b):
        for head in range(h):
            group = head // (h // k.shape[2])
            for i in range(t):
                if ids is not None and ids[row, i] == 0:
                    continue
                js = [j for j in range(i + 1) if ids is None or ids[row, j] == ids[row, i]]
                s = k[row, js, group] @ q[row, i, head] / np.sqrt(f)
                w = 1 + s + s**2 / 2
                y[row, i, head] = w @ v[row, js, group] / (w.sum() + 1e-12 if normalize else 1)
    return y


run = jax.jit(op.based, static_argnames=("implementation", "normalize"))


def near(actual, wanted, tolerance):
    scale = np.abs(wanted).max(initial=0) or 1.0
    np.testing.assert_allclose(
        np.asarray(actual, np.float64) / scale,
        np.asarray(wanted, np.float64) / scale,
        atol=tolerance,
        rtol=0,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TEST_SHAPES)
def test_outputs_against_written_out_sums(name, form):
    shape = TEST_SHAPES[name]
    ids = segments_of(shape)
    args = arguments(shape)
    with jax.enable_x64(True):
        for normalize in (True, False):
            y, _ = run(*args, normalize=normalize, implementation=form)
            near(y, expected(*args, normalize=normalize), 1e-12)
        poisoned = [np.where(ids[..., None, None] > 0, x, np.nan) for x in args]
        y, state = run(*poisoned, segment_ids=ids, implementation=form)
        near(y, expected(*args, ids=ids), 1e-12)
        assert np.isfinite(state).all()


@pytest.mark.parametrize("form", FORMS)
def test_float32_error_is_rounding(form):
    shape = TEST_SHAPES["paper"]
    args = arguments(shape)
    y, _ = run(*(x.astype(np.float32) for x in args), implementation=form)
    near(
        y, expected(*args), 2e-6
    )  # about 2^-24 times the root of 33 terms, numerator and denominator


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_error_is_that_of_its_inputs(form):
    shape = TEST_SHAPES["paper"]
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arguments(shape)]
    y, state = op.based(*narrow, implementation=form)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    exact = [np.asarray(x, np.float64) for x in narrow]
    near(y, expected(*exact), 1e-2)  # 2^-8 for the rounded weights plus 2^-8 for the rounded output


@pytest.mark.parametrize("form", ["quadratic", "chunked"])
@pytest.mark.parametrize("name", ["odd", "grouped"])
def test_gradients_and_final_state_agree_with_the_reference(name, form):
    shape = TEST_SHAPES[name]
    args, ids = arguments(shape), segments_of(shape, 3)
    rng = np.random.default_rng(5)
    width = (shape.b, shape.g, op.expanded_width(shape.f), shape.v + 1)
    # A state that came from real keys: a random one could make denominators vanish.
    with jax.enable_x64(True):
        _, before = run(*arguments(shape, 9), implementation="reference")
        chex.assert_shape(before, width)
        weights = (rng.normal(size=(shape.b, shape.t, shape.h, shape.v)), rng.normal(size=width))

        def loss(form, ids):
            def f(q, k, v, before):
                y, state = op.based(
                    q, k, v, initial_state=before, segment_ids=ids, implementation=form
                )
                return jnp.sum(y * weights[0]) + jnp.sum(state * weights[1]), (y, state)

            return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True))

        for segment_ids in (None, jnp.asarray(ids)):
            actual = loss(form, segment_ids)(*args, before)
            wanted = loss("reference", segment_ids)(*args, before)
            for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted)):
                near(a, w, 1e-11)


@pytest.mark.parametrize("form", ["quadratic", "chunked"])
def test_reruns_are_bitwise_equal(form):
    args = arguments(TEST_SHAPES["paper"], dtype=np.float32)
    f = jax.jit(jax.grad(lambda *a: jnp.sum(op.based(*a, implementation=form)[0] ** 2), (0, 1, 2)))
    chex.assert_trees_all_equal(f(*args), f(*args))


@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    t=st.integers(2, 20), cut=st.integers(1, 19), f=st.integers(1, 6), form=st.sampled_from(FORMS)
)
def test_a_sequence_can_be_cut_anywhere(t, cut, f, form):
    shape = Shape(1, t, 2, 1, f, 3)
    args = arguments(shape)
    cut = min(cut, t - 1)
    with jax.enable_x64(True):
        whole, state = run(*args, implementation=form)
        first, middle = run(*(x[:, :cut] for x in args), implementation=form)
        second, last = run(*(x[:, cut:] for x in args), initial_state=middle, implementation=form)
    near(np.concatenate([first, second], axis=1), whole, 1e-12)
    near(last, state, 1e-12)


@pytest.mark.parametrize("f", [1, 2, 3, 4, 8, 15, 16, 24])
def test_features_give_the_taylor_kernel_and_the_published_width(f):
    rng = np.random.default_rng(f)
    with jax.enable_x64(True):
        x, y = rng.normal(size=(2, 5, f))
        phi_x, phi_y = op.taylor_features(jnp.asarray(x)), op.taylor_features(jnp.asarray(y))
        s = x @ y.T / np.sqrt(f)
        assert phi_x.shape[-1] == op.expanded_width(f) == 1 + f + f * (f + 1) // 2
        near(phi_x @ phi_y.T, 1 + s + s**2 / 2, 1e-14)


def test_expanded_width_of_the_paper():
    assert op.expanded_width(16) == 153


@pytest.mark.parametrize("f", [1, 2, 5, 8])
def test_states_convert_to_the_unpacked_layout_and_back(f):
    """The unpacked layout is that of the published code: [1, x / f^(1/4), vec(x x^T) / sqrt(2 f)]."""
    rng = np.random.default_rng(f)
    k, v = rng.normal(size=(1, 9, 1, f)), rng.normal(size=(1, 9, 1, 3))
    with jax.enable_x64(True):
        _, state = run(np.zeros_like(k), k, v)
        unpacked = op.unpack_state(state, f)
        rows = k[0, :, 0]
        outer = (rows[:, :, None] * rows[:, None, :]).reshape(9, f * f)
        phi = np.concatenate([np.ones((9, 1)), rows / f**0.25, outer / np.sqrt(2 * f)], axis=1)
        v1 = np.concatenate([v[0, :, 0], np.ones((9, 1))], axis=1)
        near(unpacked[0, 0], phi.T @ v1, 1e-13)
        near(op.pack_state(unpacked, f), state, 1e-13)


def test_chunked_memory_is_linear_and_holds_no_features_per_token():
    def temporaries(t):
        shape = Shape(1, t, 1, 1, 16, 64)
        args = [jax.ShapeDtypeStruct(x.shape, np.float32) for x in arguments(shape)]
        f = jax.grad(lambda *a: op.based(*a, implementation="chunked")[0].sum(), (0, 1, 2))
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    chunked.CHUNK = 128
    small, large = temporaries(2048), temporaries(4096)
    assert large <= 2.1 * small
    # Features alone would be 153 floats a token, twice; q, k, v, their gradients and states per chunk are under that.
    assert large / 4096 < 3 * 153 * 4


def test_default_is_quadratic_for_short_and_chunked_for_long():
    args = arguments(Shape(1, 15, 1, 1, 2, 2), dtype=np.float32)
    longer = arguments(Shape(1, 40, 1, 1, 2, 2), dtype=np.float32)

    def has_scan(args):
        return "scan" in str(jax.make_jaxpr(lambda *a: op.based(*a))(*args))

    assert not has_scan(args)
    assert has_scan(longer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=np.zeros((1, 4, 1, 3))), "do not fit"),
        (
            dict(k=np.zeros((1, 4, 2, 2)), v=np.zeros((1, 4, 2, 2)), q=np.zeros((1, 4, 3, 2))),
            "share",
        ),
        (dict(initial_state=np.zeros((1, 1, 5, 3))), "initial_state"),
        (dict(segment_ids=np.zeros((1, 5), np.int32)), "segment_ids"),
        (dict(segment_ids=np.full((1, 4), -1, np.int32)), "padding"),
        (dict(implementation="cuda"), "reference, quadratic, chunked"),
    ],
)
def test_bad_arguments_are_named(change, message, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # else the annotations speak first
    good = dict(q=np.zeros((1, 4, 1, 2)), k=np.zeros((1, 4, 1, 2)), v=np.zeros((1, 4, 1, 2)))
    with pytest.raises(ValueError, match=message):
        op.based(**(good | change))
