"""`pallas_kernels.long_conv` against the sum written out in float64 numpy.

Run: pytest tests/pallas_kernels/test_long_conv.py
"""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.long_conv import api, long_conv, long_conv_history
from pallas_kernels.long_conv.direct import toeplitz_matrix
from pallas_kernels.long_conv.fft import fast_length
from pallas_kernels.long_conv.reference import long_conv_history_reference
from pallas_kernels.long_conv.segmented import SMALLEST_BLOCK, block_plan
from pallas_kernels.long_conv.shapes import TEST_SHAPES, Shape

FORMS = ("reference", "direct", "fft")
# Float64: sums of at most 131 terms, and FFTs of at most 300 points, lose under four digits of sixteen.
EXACT = 1e-12

run = jax.jit(long_conv, static_argnames="implementation")
run_history = jax.jit(long_conv_history, static_argnames=("t", "implementation"))


def arguments(shape: Shape, seed: int = 0):
    """u, kernel and segment ids (or None) in numpy."""
    rng = np.random.default_rng(seed)
    u, kernel = rng.normal(size=(shape.b, shape.t, shape.d)), rng.normal(size=(shape.m, shape.d))
    if shape.segment_ends is None:
        return u, kernel, None
    ids = np.cumsum(rng.random((shape.b, shape.t)) < shape.segment_ends, axis=1) + 1
    for row, length in enumerate(rng.integers(0, shape.t + 1, shape.b)):
        ids[row, length if row else shape.t :] = 0
    return u, kernel, ids.astype(np.int32)


def pairs(u, kernel, ids):
    """Every (row, i, j) whose product enters y."""
    for row in range(u.shape[0]):
        for i in range(u.shape[1]):
            for j in range(max(0, i - kernel.shape[0] + 1), i + 1):
                if ids is None or (ids[row, i] == ids[row, j] and ids[row, i] > 0):
                    yield row, i, j


def written_out(u, kernel, ids=None):
    y = np.zeros_like(u)
    for row, i, j in pairs(u, kernel, ids):
        y[row, i] += kernel[i - j] * u[row, j]
    return y


def gradients_written_out(u, kernel, ids, dy):
    du, dkernel = np.zeros_like(u), np.zeros_like(kernel)
    for row, i, j in pairs(u, kernel, ids):
        du[row, j] += kernel[i - j] * dy[row, i]
        dkernel[i - j] += dy[row, i] * u[row, j]
    return du, dkernel


def near(actual, wanted, tolerance=EXACT):
    scale = np.abs(wanted).max(initial=0) or 1.0
    np.testing.assert_allclose(
        np.asarray(actual, np.float64) / scale, wanted / scale, atol=tolerance, rtol=0
    )


def on_device(ids):
    """Ids as an array that a closure may hold: the annotations of the op want jax arrays."""
    return None if ids is None else jnp.asarray(ids)


def poison(u, ids):
    return u if ids is None else np.where(ids[..., None] > 0, u, np.nan)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TEST_SHAPES)
def test_outputs_and_gradients_are_the_written_out_sums(name, form):
    """Given any shape, packing and NaN in the padding, Then y, du and dkernel are the plain sums."""
    u, kernel, ids = arguments(TEST_SHAPES[name])
    dy = np.random.default_rng(1).normal(size=u.shape)

    @jax.jit
    def forward_and_back(u, kernel, dy):
        f = lambda u, kernel: long_conv(u, kernel, segment_ids=on_device(ids), implementation=form)
        y, pull = jax.vjp(f, u, kernel)
        return y, pull(dy)

    with jax.enable_x64(True):
        y, (du, dkernel) = forward_and_back(poison(u, ids), kernel, dy)
    near(y, written_out(u, kernel, ids))
    wanted = gradients_written_out(u, kernel, ids, dy)
    near(du, wanted[0])
    near(dkernel, wanted[1])


@pytest.mark.parametrize("form", FORMS)
def test_float32_error_is_rounding(form):
    u, kernel, _ = arguments(TEST_SHAPES["odd"])
    y = run(u.astype(np.float32), kernel.astype(np.float32), implementation=form)
    near(
        y, written_out(u, kernel), 2e-6
    )  # 2^-24 times the root of 37 terms, and of an FFT's stages


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_summed_in_float32(form):
    u, kernel, _ = arguments(TEST_SHAPES["odd"])
    u, kernel = jnp.asarray(u, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    y = run(u, kernel, implementation=form)
    assert y.dtype == jnp.bfloat16
    # Only the output is rounded: half of 2^-8.
    near(y, written_out(np.asarray(u, np.float64), np.asarray(kernel, np.float64)), 2**-8)


@pytest.mark.parametrize("form", ["direct", "fft"])
@pytest.mark.parametrize("name", ["odd", "packed"])
def test_reruns_are_bitwise_equal(name, form):
    u, kernel, ids = arguments(TEST_SHAPES[name])
    f = jax.jit(
        jax.grad(
            lambda u, kernel: jnp.sum(
                long_conv(u, kernel, segment_ids=on_device(ids), implementation=form) ** 2
            ),
            (0, 1),
        )
    )
    args = u.astype(np.float32), kernel.astype(np.float32)
    chex.assert_trees_all_equal(f(*args), f(*args))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(lengths=st.lists(st.integers(1, 24), max_size=24), form=st.sampled_from(("direct", "fft")))
def test_any_packing(lengths, form):
    """One compiled shape, every way to cut 24 tokens into documents and padding."""
    ids = np.zeros((1, 24), np.int32)
    start = 0
    for number, length in enumerate(lengths):
        ids[0, start : start + length] = number + 1
        start += length
    u, kernel, _ = arguments(Shape(1, 24, 2, 24))
    with jax.enable_x64(True):
        y = run(poison(u, ids), kernel, segment_ids=ids, implementation=form)
    near(y, written_out(u, kernel, ids))


@settings(deadline=None, max_examples=12, derandomize=True)
@given(t=st.integers(1, 40), m=st.integers(1, 50), form=st.sampled_from(("direct", "fft")))
def test_any_length(t, m, form):
    u, kernel, _ = arguments(Shape(2, t, 2, m))
    with jax.enable_x64(True):
        near(run(u, kernel, implementation=form), written_out(u, kernel))


def ring_of(tokens, m, fill=0.0):
    """[b, m, d] with the last m of tokens [b, n, d], position p in slot p mod m."""
    ring = np.full((tokens.shape[0], m, tokens.shape[2]), fill)
    for p in range(tokens.shape[1]):
        ring[:, p % m] = tokens[:, p]
    return ring


@pytest.mark.parametrize("form", [None, "reference", "direct", "fft"])
@pytest.mark.parametrize(("m", "filter_length", "t"), [(20, 20, 1), (20, 20, 7), (9, 9, 5)])
def test_history_continues_a_sequence(m, filter_length, t, form):
    """Given n tokens in the ring (none, some, full, wrapped), Then history + call = the tail of one convolution."""
    u, kernel, _ = arguments(Shape(1, 40, 3, filter_length))
    counts = np.array([0, 1, 5, m - 1, m, m + 4], np.int32)
    rings = np.concatenate([ring_of(u[:, :n], m, np.nan) for n in counts])
    with jax.enable_x64(True):
        past = run_history(rings, counts, kernel, t=t, implementation=form)
        reference = jax.jit(long_conv_history_reference, static_argnums=3)(
            np.nan_to_num(rings), counts, kernel, t
        )
    near(past, np.asarray(reference))
    for row, n in enumerate(counts):
        whole = written_out(u[:, : n + t], kernel)
        near(past[row], (whole - written_out_tail(u, kernel, n, t))[0, n:])


def written_out_tail(u, kernel, n, t):
    """The convolution of tokens n..n+t-1 alone, aligned with the whole."""
    alone = written_out(u[:, n : n + t], kernel)
    return np.pad(alone, ((0, 0), (n, 0), (0, 0)))


@pytest.mark.parametrize("t", [1, 6])
def test_gradients_of_the_history(t):
    """The map is linear in the ring and in the kernel: <dy, f(ring, kernel)> is each argument dotted with its gradient."""
    rng = np.random.default_rng(0)
    ring, kernel = rng.normal(size=(3, 8, 2)), rng.normal(size=(12, 2))
    counts, dy = np.array([0, 5, 11], np.int32), rng.normal(size=(3, t, 2))
    with jax.enable_x64(True):

        def f(ring, kernel, form):
            y = long_conv_history(ring, jnp.asarray(counts), kernel, t, implementation=form)
            return jnp.sum(dy * y)

        def g(ring, kernel):
            return jnp.sum(dy * long_conv_history_reference(ring, jnp.asarray(counts), kernel, t))

        wanted = jax.jit(jax.grad(g, (0, 1)))(ring, kernel)
        for form in ("direct", "fft"):
            got = jax.jit(jax.grad(f, (0, 1)), static_argnums=2)(ring, kernel, form)
            near(got[0], np.asarray(wanted[0]))
            near(got[1], np.asarray(wanted[1]))


@pytest.mark.parametrize(
    ("offset", "rows", "columns"),
    [(0, 5, 5), (3, 4, 3), (5, 1, 5), (0, 1, 1), (9, 4, 2), (2, 3, 6)],
)
def test_toeplitz_matrix(offset, rows, columns):
    kernel = jnp.arange(1.0, 8.0)[:, None]
    lag = offset + np.arange(rows)[:, None] - np.arange(columns)
    wanted = np.where((lag >= 0) & (lag < 7), lag + 1, 0)
    np.testing.assert_array_equal(toeplitz_matrix(kernel, offset, rows, columns)[0], wanted)


def test_transform_lengths_are_the_next_even_products_of_2_3_5():
    def smooth(n):
        for p in (2, 3, 5):
            while n % p == 0:
                n //= p
        return n == 1

    for n in range(1, 700):
        assert fast_length(n) == next(
            s for s in range(max(n, 2), 2 * n + 2) if s % 2 == 0 and smooth(s)
        )


@pytest.mark.parametrize("t", [1, 4, 5, 31, 32, 33, 64, 100, 1025])
def test_blocks_cover_the_row_with_little_waste(t):
    block, levels = block_plan(t)
    assert block <= SMALLEST_BLOCK
    assert t <= block << levels < t + (1 << levels)


def test_default_is_direct_for_short_rows_in_numbers_and_fft_otherwise():
    def uses_fft(b, t):
        u, kernel = np.zeros((b, t, 1), np.float32), np.zeros((t, 1), np.float32)
        return "fft" in str(jax.make_jaxpr(long_conv)(u, kernel))

    assert not uses_fft(64, 128)
    assert uses_fft(64, 129)
    assert uses_fft(4, 64)  # too few rows to pay for the matrix
    assert not uses_fft(4, 16)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_linear_in_length(packed):
    """Temporaries of the gradient; packed rows keep one masked copy per level, so t log t."""

    def temporaries(t):
        u, kernel, ids = arguments(Shape(1, t, 4, t, 0.01 if packed else None))
        f = jax.grad(
            lambda u, kernel: long_conv(
                u, kernel, segment_ids=on_device(ids), implementation="fft"
            ).sum(),
            (0, 1),
        )
        args = [jax.ShapeDtypeStruct(x.shape, np.float32) for x in (u, kernel)]
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1024) <= 2.3 * temporaries(512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(u=np.zeros((2, 4))), "do not fit"),
        (dict(kernel=np.zeros((4, 5))), "do not fit"),
        (dict(kernel=np.zeros((0, 3))), "at least one row"),
        (dict(segment_ids=np.zeros((2, 5), np.int32)), r"\(2, 4\)"),
        (dict(implementation="cuda"), "reference, direct, fft"),
    ],
)
def test_bad_arguments_are_named(change, message, monkeypatch):
    # else the annotations speak first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        long_conv(**(dict(u=np.zeros((2, 4, 3)), kernel=np.zeros((4, 3))) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kernel=np.zeros((4, 2))), "do not fit"),
        (dict(count=np.zeros(3, np.int32)), "count"),
        (dict(t=0), "t >= 1"),
        (dict(implementation="fast"), "reference, direct, fft"),
    ],
)
def test_bad_history_is_named(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    good = dict(
        history=np.zeros((2, 4, 3)), count=np.zeros(2, np.int32), kernel=np.zeros((4, 3)), t=2
    )
    with pytest.raises(ValueError, match=message):
        api.long_conv_history(**(good | change))
