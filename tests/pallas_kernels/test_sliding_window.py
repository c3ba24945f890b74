"""`pallas_kernels.sliding_window` against sums written out in float64 numpy.

Run: pytest tests/pallas_kernels/test_sliding_window.py
"""

import functools

import chex
import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels.sliding_window as op
from pallas_kernels.attention import quadratic
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.sliding_window import api, chunked
from pallas_kernels.sliding_window.shapes import TEST_SHAPES
from tests.pallas_kernels import attention_maths as maths
from tests.pallas_kernels.attention_maths import near

FORMS = ("reference", "quadratic", "chunked")
CASES = [
    (name, form)
    for name, case in TEST_SHAPES.items()
    for form in (*FORMS, *(["decode"] if case.shape.t == 1 else []))
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 4 and groups of few, so that short tests cross their boundaries."""
    monkeypatch.setattr(chunked, "BLOCK", 4)
    monkeypatch.setattr(quadratic, "SMALLEST", 8)


@functools.partial(jax.jit, static_argnames=("window", "form", "weights", "rate"))
def run(q, k, v, cotangent, ids=None, key=None, *, window, form, weights=None, rate=0.0):
    """Output and gradients; `weights` only makes jit compile again after a change of chunked.WEIGHTS."""
    del weights
    q_ids, k_ids = (None, None) if ids is None else ids

    def f(q, k, v):
        ids = {"q_segment_ids": q_ids, "k_segment_ids": k_ids}
        dropout = {"dropout_rate": rate, "dropout_key": key}
        return op.sliding_window(q, k, v, window=window, implementation=form, **ids, **dropout)

    y, vjp = jax.vjp(f, q, k, v)
    return y, vjp(cotangent.astype(y.dtype))


def compare(actual, wanted, tolerance):
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted)):
        near(a, w, tolerance)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_outputs_and_gradients_against_written_out_sums(name, form):
    shape, window = TEST_SHAPES[name]
    *arrays, cotangent = maths.arguments(shape)
    ids = maths.segments_of(shape)
    with jax.enable_x64(True):
        # 1e-12: float64 rounding over tens of terms.
        if form != "reference" and name != "itself":  # those need no second way
            actual = run(*arrays, cotangent, window=window, form=form)
            compare(actual, maths.attention(*arrays, cotangent, window=window), 1e-12)
        actual = run(*maths.poisoned(arrays, ids), cotangent, ids, window=window, form=form)
        compare(actual, maths.attention(*arrays, cotangent, ids, window=window), 1e-12)


@pytest.mark.parametrize("weights", [1, 400])
def test_groups_of_blocks_change_nothing(weights, monkeypatch):
    """One block at a time, and a few at a time with a last group that is not full."""
    monkeypatch.setattr(chunked, "WEIGHTS", weights)
    shape, window = TEST_SHAPES["history"]
    *arrays, cotangent = maths.arguments(shape)
    ids = maths.segments_of(shape)
    with jax.enable_x64(True):
        actual = run(*arrays, cotangent, ids, window=window, form="chunked", weights=weights)
    compare(actual, maths.attention(*arrays, cotangent, ids, window=window), 1e-12)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    t=st.integers(1, 18),
    history=st.integers(0, 12),
    window=st.integers(1, 20),
    seed=st.integers(0, 99),
    form=st.sampled_from(["quadratic", "chunked"]),
)
def test_any_small_shape(t, history, window, seed, form):
    shape = Shape(1, t, t + history, 2, 1, 3, 2)
    *arrays, cotangent = maths.arguments(shape, seed)
    ids = maths.segments_of(shape, seed)
    with jax.enable_x64(True):
        actual = run(*maths.poisoned(arrays, ids), cotangent, ids, window=window, form=form)
    compare(actual, maths.attention(*arrays, cotangent, ids, window=window), 1e-12)


@pytest.mark.parametrize("form", ["chunked"])  # the quadratic form is attention's
def test_dropout_is_that_of_the_reference(form):
    """The reference's mask is tested with attention."""
    shape, window = TEST_SHAPES["grouped"]
    args = maths.arguments(shape)
    options = dict(key=jax.random.key(3), rate=0.4, window=window)
    with jax.enable_x64(True):
        compare(run(*args, form=form, **options), run(*args, form="reference", **options), 1e-12)


def test_a_window_of_one_is_the_value_itself():
    q, k, v, cotangent = maths.arguments(TEST_SHAPES["odd"].shape)
    y, _ = run(*(x.astype(np.float32) for x in (q, k, v, cotangent)), window=1, form=None)
    near(y, v, 1e-6)


@pytest.mark.parametrize("form", ["quadratic", "chunked"])
def test_float32_error_is_rounding_and_reruns_are_bitwise_equal(form):
    shape, window = TEST_SHAPES["odd"]
    args = maths.arguments(shape)
    narrow = [x.astype(np.float32) for x in args]
    once, again = (run(*narrow, window=window, form=form) for _ in range(2))
    chex.assert_trees_all_equal(once, again)
    compare(once, maths.attention(*args, window=window), 5e-6)  # 2^-24 times some tens of roundings


def test_chunked_time_and_memory_are_linear(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 64)

    def costs(t, form):
        q = jax.ShapeDtypeStruct((1, t, 1, 16), np.float32)
        f = lambda *a: op.sliding_window(*a, window=32, implementation=form).sum()
        compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(q, q, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    small, large = costs(1024, "chunked"), costs(2048, "chunked")
    assert large[0] <= 2.1 * small[0]
    assert large[1] <= 2.1 * small[1]
    assert large[0] < costs(2048, "reference")[0] / 8


def test_default_by_length_and_window():
    assert api.fastest(1, 8) == "decode"
    assert api.fastest(256, 8) == "quadratic"
    assert api.fastest(1024, 256) == "quadratic"
    assert api.fastest(1024, 64) == "chunked"
    assert api.fastest(4096, 2048) == "chunked"
    # Through the op: a band, and nothing at all.
    shape = Shape(1, 300, 300, 1, 1, 2, 2)
    args = [x.astype(np.float32) for x in maths.arguments(shape)]
    compare(run(*args, window=8, form=None), maths.attention(*args, window=8), 5e-6)
    y = jax.eval_shape(functools.partial(op.sliding_window, window=8), args[0][:, :0], *args[1:3])
    chex.assert_shape(y, (1, 0, 1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=0), "at least 1"),
        (dict(k=np.zeros((1, 4, 1, 3))), "do not fit"),
        (dict(q=np.zeros((1, 5, 1, 2))), "at least as many keys"),
        (dict(dropout_rate=0.1), "dropout_key"),
        (dict(implementation="cuda"), "reference, quadratic, chunked, decode"),
        (dict(implementation="decode"), "one query"),
    ],
)
def test_bad_arguments_are_named(change, message, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # else the annotations speak first
    x = np.zeros((1, 4, 1, 2))
    with pytest.raises(ValueError, match=message):
        op.sliding_window(**(dict(q=x, k=x, v=x, window=2) | change))
