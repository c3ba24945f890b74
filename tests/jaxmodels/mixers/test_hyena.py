"""Hyena against its formula in float64 numpy; the law (test_law.py) and parity with the original cover the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.mixers.hyena import Hyena, decay_rates


def affine(params, x):
    return x @ params["kernel"] + params.get("bias", 0)


def taps(kernel, x):
    """sum over lag of kernel[lag] * x[i - lag]"""
    y = np.zeros_like(x)
    for lag in range(min(len(kernel), x.shape[1])):
        y[:, lag:] += kernel[lag] * x[:, : x.shape[1] - lag]
    return y


def written_out(p, u, max_len):
    d = u.shape[2]
    x = affine(p["in_proj"], u)
    x = taps(p["short_filter"]["kernel"], x) + p["short_filter"]["bias"]
    x1, x2, v = x[..., :d], x[..., d : 2 * d], x[..., 2 * d :]
    f = p["filter_fn"]
    h = f["z"]
    for index in (0, 2, 4):
        h = np.sin(f["freq"] * affine(f[f"implicit_filter_{index}"], h))
    h = affine(f["implicit_filter_6"], h)
    h = h * np.exp(-np.linspace(0, 1, max_len)[:, None] * decay_rates(d))
    v = v * x1
    return affine(p["out_proj"], (taps(h, v) + f["bias"] * v) * x2)


def test_formula():
    max_len, d = 20, 4
    mixer = Hyena(d, max_len=max_len, filter_order=8, dtype=jnp.float64, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    u = rng.normal(size=(2, 13, d))
    with jax.enable_x64(True):
        shapes = jax.eval_shape(mixer.init, jax.random.key(0), u)["params"]
        params = jax.tree.map(lambda s: rng.normal(size=s.shape), shapes)
        y, state = jax.jit(mixer.apply)({"params": params}, u)
    assert state is None
    wanted = written_out(params, u, max_len)
    np.testing.assert_allclose(y, wanted, atol=1e-12 * np.abs(wanted).max())


def test_decay_reaches_a_hundredth_where_the_paper_says():
    rates = decay_rates(5)
    np.testing.assert_allclose(np.exp(-1.5 * rates[0]), 0.01)
    np.testing.assert_allclose(np.exp(-0.3 * rates[-1]), 0.01)
    np.testing.assert_allclose(np.diff(rates), np.diff(rates)[0])


def test_state_and_legacy_bytes():
    mixer = Hyena(64, max_len=512)
    for length, kept in ((100, 100), (10_000, 512)):
        state = mixer.init_state(1, length)
        # gated inputs, two inputs of the short convolution over 3 d channels, a segment id and a position
        expected = kept * 64 * 4 + 2 * 192 * 4 + 8
        assert sum(x.nbytes for x in jax.tree.leaves(state)) == expected
    assert mixer.legacy_state_elements(1024) == 65536


def test_call_longer_than_the_filter():
    with pytest.raises(ValueError, match="9 tokens is longer than the filter: max_len is 8"):
        jax.eval_shape(Hyena(4, max_len=8).init, jax.random.key(0), jnp.zeros((1, 9, 4)))


def test_dropout_is_on_only_with_its_stream():
    mixer = Hyena(4, max_len=8, filter_order=4, dropout=0.5)
    u = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 4)), jnp.float32)
    params = jax.tree.map(lambda p: p + 1, jax.jit(mixer.init)(jax.random.key(0), u))
    run = jax.jit(
        lambda key: mixer.apply(params, u, rngs={} if key is None else {"dropout": key})[0]
    )
    plain = run(None)
    np.testing.assert_array_equal(plain, run(None))
    dropped = run(jax.random.key(1))
    assert not np.allclose(dropped, plain)
    assert not np.allclose(dropped, run(jax.random.key(2)))
