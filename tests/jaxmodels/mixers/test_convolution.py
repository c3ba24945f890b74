"""The convolutions inside mixers, against numpy: taps, long filters, their streaming states, their first weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.mixers.convolution import (
    ImplicitLongConvolution,
    LongConvolution,
    ShortConvolution,
    check_length,
    filter_features,
    init_long_state,
    lags_needed,
)
from jaxmodels.mixers.segments import init_cursor, layout

D = 3
IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 5, 0], [4, 4, 4, 4, 4, 4, 4, 4, 4]], np.int32)


def run(conv, x, state=None, cursor=None, ids=None, seed=0):
    """y, new state, new cursor, parameters (drawn wide from a fixed seed)."""
    ids = None if ids is None else jnp.asarray(ids)

    @jax.jit
    def call(x, state, cursor):
        where = layout(ids, cursor, *x.shape[:2])
        params = conv.init(jax.random.key(seed), x, state, where)["params"]
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        y, state = conv.apply({"params": params}, x, state, where)
        return y, state, where.cursor, params

    return jax.device_get(call(x, state, cursor))


def convolved(x, kernel, ids):
    """sum over lags inside the segment of kernel[lag] * x[i - lag], lags past the kernel being 0."""
    y = np.zeros_like(x)
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            for lag in range(min(i + 1, len(kernel))):
                if ids[row, i] > 0 and ids[row, i - lag] == ids[row, i]:
                    y[row, i] += kernel[lag] * x[row, i - lag]
    return y


def inputs(t=IDS.shape[1]):
    return np.random.default_rng(3).normal(size=(2, t, D)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 12])
@pytest.mark.parametrize("ids", [None, IDS])
def test_short_convolution(size, ids):
    x = inputs()
    y, _, _, params = run(ShortConvolution(D, size), x, ids=ids)
    known = np.ones_like(IDS) if ids is None else ids
    wanted = convolved(x, params["kernel"], known) + params["bias"]
    real = known > 0
    # float32, at most 13 terms
    np.testing.assert_allclose(y[real], wanted[real], atol=1e-5)


@pytest.mark.parametrize("ids", [None, IDS])
def test_short_state_is_the_last_inputs_of_the_segment(ids):
    x, conv = inputs(), ShortConvolution(D, 4)
    state = np.asarray(conv.init_state(2))
    assert state.shape == (2, 3, D)
    _, state, _, _ = run(conv, x, state, init_cursor(2), ids)
    if ids is None:
        np.testing.assert_array_equal(state, x[:, -3:])
    else:
        # Row 0 ends in a segment of one token, before one token of padding.
        np.testing.assert_array_equal(state[0], [np.zeros(D), np.zeros(D), x[0, 7]])
        np.testing.assert_array_equal(state[1], x[1, -3:])


def test_short_initialisation_is_torch_conv1d():
    params = ShortConvolution(500, 4).init(
        jax.random.key(0), jnp.zeros((1, 1, 500)), None, layout(None, None, 1, 1)
    )["params"]
    for p in params.values():
        # uniform on (-1/2, 1/2): deviation 1/sqrt(12), known to about 1 part in 30 from 500 draws
        assert 0.49 < np.abs(p).max() < 0.5
        assert np.std(p) == pytest.approx(12**-0.5, rel=0.1)


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("implicit", [True, False])
def test_long_convolution_adds_its_input(implicit, ids):
    x, max_len = inputs(), 20
    cls = ImplicitLongConvolution if implicit else LongConvolution
    y, state, _, params = run(cls(D, max_len), x, ids=ids)
    assert state is None
    if implicit:
        a, b = params["filter"]["mlp_0"], params["filter"]["mlp_2"]
        hidden = np.maximum(filter_features(max_len) @ a["kernel"] + a["bias"], 0)
        kernel = hidden @ b["kernel"] + b["bias"]
    else:
        kernel = params["filter"]["kernel"]
        assert kernel.shape == (max_len, D)
    known = np.ones_like(IDS) if ids is None else ids
    wanted = np.where(known[..., None] > 0, convolved(x, kernel, known) + x, 0)
    actual = np.where(known[..., None] > 0, y, 0)
    np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())


def test_features_are_those_of_zoology():
    features = filter_features(5)
    np.testing.assert_allclose(features[:, 0], [0, 0.25, 0.5, 0.75, 1])
    w = 2 * np.pi * np.arange(5) / 5
    np.testing.assert_allclose(features[:, 1] + 1j * features[:, 2], np.exp(-1j * 1e-4 * w))
    np.testing.assert_array_equal(filter_features(1), [[0, 1, 0]])


def test_long_state_is_a_ring_of_inputs():
    """Position p in slot p mod m, zeros where there is nothing, through segments and past the end of the filter."""
    x, conv = inputs(), LongConvolution(D, 5)
    empty = np.asarray(init_long_state(2, 100, 5, D))
    assert empty.shape == (2, 5, D)
    assert init_long_state(2, 3, 5, D).shape == (2, 3, D)
    _, state, cursor, _ = run(conv, x, empty, init_cursor(2), IDS)
    np.testing.assert_array_equal(cursor["position"], [1, 9])
    np.testing.assert_array_equal(state[0], [x[0, 7], *np.zeros((4, D))])
    np.testing.assert_array_equal(state[1], [x[1, 5], x[1, 6], x[1, 7], x[1, 8], x[1, 4]])


def test_streaming_past_the_filter_is_the_filter_cut_off():
    """Given a stream longer than max_len, Then lags of max_len and more have weight 0, in pieces of any size."""
    x, conv = inputs(14), LongConvolution(D, 5)
    state, cursor, out = np.asarray(init_long_state(2, 5, 5, D)), init_cursor(2), []
    for start, stop in ((0, 4), (4, 8), (8, 9), (9, 10), (10, 14)):
        y, state, cursor, params = run(conv, x[:, start:stop], state, cursor)
        out.append(y)
    wanted = convolved(x, params["filter"]["kernel"], np.ones((2, 14), int)) + x
    np.testing.assert_allclose(np.concatenate(out, 1), wanted, atol=1e-5 * np.abs(wanted).max())


def test_filters_are_evaluated_as_far_as_needed():
    x, ring = jnp.zeros((1, 4, D)), jnp.zeros((1, 6, D))
    assert lags_needed(x, None, 100) == 4
    assert lags_needed(x, ring, 100) == 10
    assert lags_needed(x, ring, 8) == 8


def test_a_call_longer_than_the_filter_is_an_error_unless_it_is_packed():
    with pytest.raises(ValueError, match="a call of 9 tokens is longer than the filter: max_len"):
        check_length(9, 8, layout(None, None, 1, 9))
    check_length(9, 8, layout(jnp.ones((1, 9), jnp.int32), None, 1, 9))
    check_length(8, 8, layout(None, None, 1, 8))
