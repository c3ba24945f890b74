"""`pallas_kernels.based` against sums written out in float64 numpy.

Run: pytest tests/pallas_kernels/test_based.py
"""

import functools

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
from tests.pallas_kernels import based_law as law
from tests.pallas_kernels.based_law import near

FORMS = ("reference", "quadratic", "chunked")
# Every form runs the same numbers; the specification itself only a few of them.
RUNS = [(form, name) for form in FORMS[1:] for name in law.CASES]
RUNS += [("reference", name) for name in ("packed", "f4_v16_grouped", "no_state")]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8, so that short tests cross chunk boundaries."""
    monkeypatch.setattr(chunked, "CHUNK", 8)


def form(name):
    return functools.partial(op.based, implementation=name)


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_float64_outputs_state_and_gradients_are_the_exact_ones(name, case):
    with jax.enable_x64(True):
        law.check_numbers(form(name), law.CASES[case], np.float64, law.FLOAT64)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("case", ["paper", "packed"])
def test_narrow_dtypes_lose_what_rounding_loses(name, case):
    law.check_numbers(form(name), law.CASES[case], np.float32, law.FLOAT32)
    law.check_numbers(form(name), law.CASES[case], jnp.bfloat16, law.BFLOAT16)


@pytest.mark.parametrize("name", ["quadratic", "chunked"])
def test_law_of_transformations_and_reruns(name):
    law.check_transforms(form(name), law.CASES["packed"], np.float32, law.FLOAT32)
    law.check_reruns(form(name), law.CASES["paper"], np.float32)


def test_dispatched_calls_obey_the_same_law():
    law.check_transforms(op.based, law.CASES["f4_v16_grouped"], np.float32, law.FLOAT32)
    law.check_cuts(op.based, law.CASES["packed"], np.float32, law.FLOAT32, 13)


def test_the_exact_gradients_agree_with_finite_differences():
    case = law.Case(1, 7, 2, 1, 4, 3, segments=True)
    given = law.arguments(case)
    given.ids[:] = [3, 3, 3, 5, 5, 5, 0]
    value = lambda given: (lambda out: np.sum(out.y * given.dy) + np.sum(out.state * given.dstate))(
        law.exact(given)
    )
    results, rng = law.exact(given), np.random.default_rng(1)
    for field, gradient in (
        ("q", results.dq),
        ("k", results.dk),
        ("v", results.dv),
        ("state", results.dstate),
    ):
        step = 1e-6 * rng.normal(size=gradient.shape)
        ahead, behind = (
            value(given._replace(**{field: getattr(given, field) + sign * step}))
            for sign in (1, -1)
        )
        np.testing.assert_allclose((ahead - behind) / 2, np.sum(gradient * step), rtol=1e-6)


@pytest.mark.parametrize("name", ["quadratic", "chunked", None])
def test_second_derivatives_are_those_of_the_reference(name):
    given = law.arguments(law.Case(1, 19, 2, 1, 4, 3, segments=True))
    ids = jnp.asarray(given.ids)

    def curvature(name):
        def loss(arrays):
            y, state = op.based(
                *arrays[:3], initial_state=arrays[3], segment_ids=ids, implementation=name
            )
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state / 10))

        inner = lambda arrays: sum(jnp.sum(jnp.cos(x) * x) for x in jax.grad(loss)(arrays))
        return jax.jit(jax.grad(inner))(given[:4])

    with jax.enable_x64(True):
        for a, w in zip(curvature(name), curvature("reference")):
            near(a, w, 1e-10)


def test_forward_mode_is_the_references():
    args = [jnp.asarray(x, jnp.float32) for x in arguments(Shape(1, 5, 1, 1, 2, 2))]
    call = lambda name: jax.jvp(lambda *a: form(name)(*a)[0], args, args)
    assert np.isfinite(call("reference")[1]).all()
    with pytest.raises(TypeError, match="custom_vjp"):
        call("chunked")


def arguments(shape: Shape, seed: int = 0, dtype=np.float64):
    """q, k, v in numpy; the op's jitted callers turn them into arrays."""
    rng = np.random.default_rng(seed)
    b, t, h, g, f, v = shape
    return tuple(
        rng.normal(size=size).astype(dtype) for size in ((b, t, h, f), (b, t, g, f), (b, t, g, v))
    )


run = jax.jit(op.based, static_argnames=("implementation", "normalize"))


@pytest.mark.parametrize("name", ["narrow", "odd", "one_token"])
def test_odd_widths(name):
    shape = TEST_SHAPES[name]
    case = law.Case(*shape, segments=True)
    with jax.enable_x64(True):
        law.check_numbers(form("chunked"), case, np.float64, law.FLOAT64)


def test_no_tokens_give_no_outputs_and_the_state_unchanged():
    q = jnp.zeros((2, 0, 1, 4))
    state = jnp.ones((2, 1, op.expanded_width(4), 5))
    y, after = op.based(q, q, q, initial_state=state)
    assert y.shape == (2, 0, 1, 4)
    chex.assert_trees_all_equal(after, state)


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
        return "while" in jax.jit(op.based).lower(*args).as_text()

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
        (dict(segment_ids=np.full((1, 4), -1, np.int32)), "row 0 has -1"),
        (dict(segment_ids=np.array([[4, 4, 3, 0]], np.int32)), "row 0 goes from 4 to 3 at token 2"),
        (dict(segment_ids=np.array([[1, 0, 1, 0]], np.int32)), "after all others"),
        (dict(implementation="cuda"), "reference, quadratic, chunked, tpu, gpu"),
    ],
)
def test_bad_arguments_are_named(change, message, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # else the annotations speak first
    good = dict(q=np.zeros((1, 4, 1, 2)), k=np.zeros((1, 4, 1, 2)), v=np.zeros((1, 4, 1, 2)))
    with pytest.raises(ValueError, match=message):
        op.based(**(good | change))
