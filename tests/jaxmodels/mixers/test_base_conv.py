"""BaseConv against its formula; the law (test_law.py) and parity with the original cover the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.mixers.base_conv import BaseConv


def silu(x):
    return x / (1 + np.exp(-x))


def identity(x):
    return x


def run(mixer, x, seed=0):
    @jax.jit
    def call(x):
        params = mixer.init(jax.random.key(seed), x)["params"]
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        return mixer.apply({"params": params}, x)[0], params

    return jax.device_get(call(x))


@pytest.mark.parametrize(
    "fields", [dict(), dict(use_act=True, kernel_size=2), dict(kernel_size=-1, implicit=False)]
)
def test_formula(fields):
    u = np.random.default_rng(1).normal(size=(2, 7, 4)).astype(np.float32)
    y, params = run(BaseConv(4, max_len=9, **fields), u)
    long = fields.get("kernel_size") == -1
    kernel = params["conv"]["filter"]["kernel"] if long else params["conv"]["kernel"]
    conv = u.copy() if long else np.zeros_like(u) + params["conv"]["bias"]
    for lag in range(min(7, len(kernel))):
        conv[:, lag:] += kernel[lag] * u[:, : 7 - lag]
    projection = u @ params["projection"]["kernel"] + params["projection"]["bias"]
    act = silu if fields.get("use_act") else identity
    np.testing.assert_allclose(y, act(conv) * act(projection) + u, atol=1e-5 * np.abs(y).max())


def state_bytes(state):
    return sum(x.nbytes for x in jax.tree.leaves(state))


def test_state_is_fixed_for_taps_and_grows_for_long_filters():
    cursor = 8  # a segment id and a position
    for length in (16, 1024):
        assert state_bytes(BaseConv(64).init_state(1, length)) == 2 * 64 * 4 + cursor
    long = BaseConv(64, kernel_size=-1, max_len=512)
    assert state_bytes(long.init_state(1, 100)) == 100 * 64 * 4 + cursor
    assert state_bytes(long.init_state(1, 10_000)) == 512 * 64 * 4 + cursor
    assert long.init_state(2, 3, jnp.bfloat16)["conv"].dtype == jnp.bfloat16


def test_legacy_state_is_zoologys_count():
    assert BaseConv(64).legacy_state_elements(1024) == 192
    assert BaseConv(64, kernel_size=5).legacy_state_elements(1024) == 320
    assert BaseConv(64, kernel_size=-1).legacy_state_elements(1024) == 64 * 1024


@pytest.mark.parametrize("size", [0, -2])
def test_impossible_kernel_size(size):
    with pytest.raises(ValueError, match=f"at least 1, or -1 for a long filter, got {size}"):
        BaseConv(4, kernel_size=size).init_state(1, 4)


def test_call_longer_than_the_filter():
    mixer = BaseConv(4, kernel_size=-1, max_len=8)
    with pytest.raises(ValueError, match="9 tokens is longer than the filter: max_len is 8"):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 9, 4)))
