"""`pallas_kernels.attention` against sums written out in float64 numpy.

Run: pytest tests/pallas_kernels/test_attention.py
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

import pallas_kernels.attention as op
from pallas_kernels.attention import api, chunked, quadratic
from pallas_kernels.attention.dropout import kept, row_bits
from pallas_kernels.attention.shapes import TEST_SHAPES, Shape
from tests.pallas_kernels import attention_maths as maths
from tests.pallas_kernels.attention_maths import near

FORMS = ("reference", "quadratic", "chunked")
CASES = [
    (name, form)
    for name, shape in TEST_SHAPES.items()
    for form in (*FORMS, *(["decode"] if shape.t == 1 else []))
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8, so that short tests cross their boundaries."""
    monkeypatch.setattr(chunked, "BLOCK", 8)
    monkeypatch.setattr(chunked, "LARGE_BLOCK", 8)
    monkeypatch.setattr(quadratic, "SMALLEST", 8)


@functools.partial(jax.jit, static_argnames=("form", "options"))
def run(q, k, v, cotangent, ids=None, key=None, *, form, options=()):
    """Output and gradients; without ids, ids are not passed."""
    q_ids, k_ids = (None, None) if ids is None else ids

    def f(q, k, v):
        ids = {"q_segment_ids": q_ids, "k_segment_ids": k_ids}
        return op.attention(q, k, v, dropout_key=key, implementation=form, **ids, **dict(options))

    y, vjp = jax.vjp(f, q, k, v)
    return y, vjp(cotangent.astype(y.dtype))


def compare(actual, wanted, tolerance):
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted)):
        near(a, w, tolerance)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_outputs_and_gradients_against_written_out_sums(name, form):
    shape = TEST_SHAPES[name]
    *arrays, cotangent = maths.arguments(shape)
    ids = maths.segments_of(shape)
    with jax.enable_x64(True):
        # 1e-12: float64 rounding over tens of terms.
        if form != "reference":  # which has one way, with ids or without
            compare(run(*arrays, cotangent, form=form), maths.attention(*arrays, cotangent), 1e-12)
        actual = run(*maths.poisoned(arrays, ids), cotangent, ids, form=form)
        compare(actual, maths.attention(*arrays, cotangent, ids), 1e-12)
        assert not np.asarray(actual[0])[ids[0] == 0].any(), "padding has an output"


@pytest.mark.parametrize("form", FORMS)
def test_float32_error_is_rounding(form):
    shape = TEST_SHAPES["odd"]
    args = maths.arguments(shape)
    narrow = [x.astype(np.float32) for x in args]
    # 2^-24 times the few hundred roundings of a row, through exponential and normaliser.
    compare(run(*narrow, form=form), maths.attention(*args), 5e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_error_is_that_of_its_roundings(form):
    shape = TEST_SHAPES["grouped"]
    narrow = [x.astype(jnp.bfloat16) for x in maths.arguments(shape)]
    y, gradients = run(*narrow, form=form)
    assert {x.dtype for x in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    # 2^-8 each for the weights, the output it centres on, and the result; products accumulate in float32.
    compare((y, gradients), maths.attention(*(np.asarray(x, np.float64) for x in narrow)), 2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_do_not_overflow(form):
    shape = TEST_SHAPES["odd"]
    *arrays, cotangent = maths.arguments(shape)
    with jax.enable_x64(True):
        y, gradients = run(*arrays, cotangent, form=form, options=(("scale", 1e3),))
    near(y, maths.attention(*arrays, cotangent, scale=1e3)[0], 1e-10)
    # Their values are differences of numbers 1e3 times as large, so only that they are numbers.
    chex.assert_tree_all_finite(gradients)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    t=st.integers(1, 18),
    history=st.integers(0, 12),
    groups=st.integers(1, 2),
    share=st.integers(1, 2),
    seed=st.integers(0, 99),
    form=st.sampled_from(["quadratic", "chunked"]),
)
def test_any_small_shape(t, history, groups, share, seed, form):
    shape = Shape(1, t, t + history, groups * share, groups, 3, 2)
    *arrays, cotangent = maths.arguments(shape, seed)
    ids = maths.segments_of(shape, seed)
    with jax.enable_x64(True):
        actual = run(*maths.poisoned(arrays, ids), cotangent, ids, form=form)
    compare(actual, maths.attention(*arrays, cotangent, ids), 1e-12)


@pytest.mark.parametrize("form", ["quadratic", "chunked"])
def test_reruns_are_bitwise_equal(form):
    args = [x.astype(np.float32) for x in maths.arguments(TEST_SHAPES["odd"])]
    chex.assert_trees_all_equal(run(*args, form=form), run(*args, form=form))


@functools.partial(jax.jit, static_argnames=("shape", "rate"))
def mask(key, shape, distance, rate):
    """What dropout keeps: [b, h, t, s] for the rows [b, t, h]."""
    return kept(jnp.moveaxis(row_bits(key, shape), 1, 2), distance, rate)


@pytest.mark.parametrize(("name", "form"), [c for c in CASES if c[0] in ("grouped", "decoding")])
def test_dropout_is_the_same_in_every_form(name, form):
    """The dropped weights written out: mask of `kept` by row and distance, the rest scaled up."""
    shape = TEST_SHAPES[name]
    q, k, v, cotangent = maths.arguments(shape)
    key, rate = jax.random.key(3), 0.4
    with jax.enable_x64(True):
        options = (("dropout_rate", rate),)
        y, gradients = run(q, k, v, cotangent, key=key, form=form, options=options)
        distance = np.arange(shape.t)[:, None] + shape.s - shape.t - np.arange(shape.s)
        keep = mask(key, shape[:2] + shape[3:4], distance, rate)
        share = shape.h // shape.g
        k, v = np.repeat(k, share, 2), np.repeat(v, share, 2)
        s = np.einsum("bthk,bshk->bhts", q, k) * shape.k**-0.5
        p = np.where(distance >= 0, np.exp(s - s.max(-1, keepdims=True)), 0)
        p = p / p.sum(-1, keepdims=True)
        dropped = np.where(keep, p / (1 - rate), 0)
        near(y, np.einsum("bhts,bshv->bthv", dropped, v), 1e-12)
        dv = np.einsum("bhts,bthv->bshv", dropped, cotangent)
        near(gradients[2], dv.reshape(*dv.shape[:2], shape.g, share, -1).sum(3), 1e-12)
        dp = np.where(keep, np.einsum("bthv,bshv->bhts", cotangent, v) / (1 - rate), 0)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * shape.k**-0.5
        near(gradients[0], np.einsum("bhts,bshk->bthk", ds, k), 1e-12)


def test_dropout_keeps_its_share_of_independent_weights():
    rate, rows, t = 0.3, 512, 256
    distance = np.arange(t)[:, None] - np.arange(t)
    keeps = [mask(jax.random.key(i), (rows // t, t, 1), distance, rate) for i in range(2)]
    keep, other = (np.asarray(x).reshape(-1, t) for x in keeps)
    n = keep.size
    deviation = np.sqrt(rate * (1 - rate))
    # Five standard errors of the mean, and of the correlation of neighbours along keys and along rows.
    assert abs(keep.mean() - (1 - rate)) < 5 * deviation / np.sqrt(n)
    centred = (keep - keep.mean()) / deviation
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size)
    diagonal = (centred[1:, 1:] * centred[:-1, :-1]).mean()  # equal distance, neighbouring rows
    assert abs(diagonal) < 5 / np.sqrt(n)
    assert abs((other == keep).mean() - (1 - 2 * deviation**2)) < 0.01


def test_chunked_memory_is_linear_and_keeps_no_weights():
    def temporaries(t, form):
        q = jax.ShapeDtypeStruct((1, t, 2, 16), np.float32)
        f = jax.grad(lambda *a: op.attention(*a, implementation=form).sum(), (0, 1, 2))
        return jax.jit(f).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    chunked.LARGE_BLOCK = 128
    small, large = temporaries(1024, "chunked"), temporaries(2048, "chunked")
    assert large <= 2.1 * small
    assert large < temporaries(2048, "quadratic") / 8


def test_default_is_quadratic_for_short_and_chunked_for_long(monkeypatch):
    monkeypatch.setattr(api, "QUADRATIC_UP_TO", 16)
    monkeypatch.setattr(api, "FEW_QUERIES", 4)
    assert api.fastest(1, 1000) == "decode"
    assert api.fastest(4, 1000) == "quadratic"
    assert api.fastest(16, 16) == "quadratic"
    assert api.fastest(17, 17) == "chunked"

    def has_scan(t):
        x = np.zeros((1, t, 1, 2), np.float32)
        return "scan" in str(jax.make_jaxpr(op.attention)(x, x, x))

    assert not has_scan(16)
    assert has_scan(40)


def test_empty_call():
    y = jax.jit(op.attention)(*(np.zeros((2, n, 2, 3), np.float32) for n in (0, 4, 4)))
    chex.assert_shape(y, (2, 0, 2, 3))


def test_cache_of_another_type_sees_only_visible_slots():
    shape = TEST_SHAPES["decoding"]
    q, k, v, cotangent = maths.arguments(shape)
    visible = np.random.default_rng(1).random((shape.b, shape.s)) < 0.5
    visible[1] = False
    ids = (np.ones((shape.b, 1), np.int32), visible.astype(np.int32))
    wanted, _ = maths.attention(q, k, v, cotangent, ids)
    narrow = q.astype(jnp.bfloat16)
    y = jax.jit(op.attend_to_cache)(narrow, k.astype(np.float32), v.astype(np.float32), visible)
    assert y.dtype == jnp.bfloat16
    near(y, wanted, 1e-2)  # q and the output rounded to 8 bits
    assert not np.asarray(y[1], np.float32).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=np.zeros((1, 4, 1, 3))), "do not fit"),
        (dict(q=np.zeros((4, 1, 2))), r"must be \[b, t, h, k\]"),
        (
            dict(q=np.zeros((1, 4, 3, 2)), k=np.zeros((1, 4, 2, 2)), v=np.zeros((1, 4, 2, 2))),
            "share",
        ),
        (dict(q=np.zeros((1, 5, 1, 2))), "at least as many keys"),
        (dict(q_segment_ids=np.ones((1, 4), np.int32)), "for neither"),
        (
            dict(q_segment_ids=np.ones((1, 4), np.int32), k_segment_ids=np.ones((1, 5), np.int32)),
            "k_segment_ids",
        ),
        (
            dict(q_segment_ids=np.full((1, 4), -1), k_segment_ids=np.ones((1, 4), np.int32)),
            "q_segment_ids must be 0",
        ),
        (dict(dropout_rate=0.1), "dropout_key"),
        (dict(dropout_rate=1.0), "dropout_rate"),
        (dict(implementation="cuda"), "reference, quadratic, chunked, decode"),
        (dict(implementation="decode"), "one query"),
    ],
)
def test_bad_arguments_are_named(change, message, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # else the annotations speak first
    good = dict(q=np.zeros((1, 4, 1, 2)), k=np.zeros((1, 4, 1, 2)), v=np.zeros((1, 4, 1, 2)))
    with pytest.raises(ValueError, match=message):
        op.attention(**(good | change))
