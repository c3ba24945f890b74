"""What is particular to the sliding window: how it counts, and its ring buffer. The law is in test_law.py.

Run: pytest tests/jaxmodels/mixers/test_sliding_window.py
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.mixers.attention import Attention
from jaxmodels.mixers.sliding_window import SlidingWindow

B, T, D = 2, 11, 16


def inputs(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)), jnp.float32)


def parameters(mixer, x):
    """At a scale where attention is far from uniform."""
    return jax.tree.map(lambda p: 20 * p, jax.jit(mixer.init)(jax.random.key(0), x))


def applied(mixer):
    """The compiled call; eager, every op of it would compile by itself."""
    return jax.jit(mixer.apply)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_token_sees_exactly_window_keys(window):
    """The gradient of output t with respect to the inputs is zero outside t - window < j <= t, and nowhere inside."""
    mixer, x = SlidingWindow(D, window=window), inputs()
    params = parameters(mixer, x)
    reach = jax.jit(jax.jacobian(lambda x: mixer.apply(params, x)[0][0].sum(-1)))(x)[:, 0]
    seen = np.abs(reach).max(-1) > 0
    distance = np.arange(T)[:, None] - np.arange(T)
    np.testing.assert_array_equal(seen, (distance >= 0) & (distance < window))


def test_a_window_of_the_whole_sequence_is_attention():
    fields = dict(num_heads=4, num_kv_heads=2, rotary_fraction=1.0, use_bias=False)
    x = inputs()
    params = parameters(Attention(D, **fields), x)
    wanted, _ = applied(Attention(D, **fields))(params, x)
    for window in (T, 64):
        y, _ = applied(SlidingWindow(D, window=window, **fields))(params, x)
        chex.assert_trees_all_close(y, wanted, atol=1e-5)


def test_the_ring_holds_the_token_at_position_p_in_slot_p_mod_window():
    window = 4
    mixer, x = SlidingWindow(D, window=window), inputs()
    params = parameters(mixer, x)
    cache = Attention(D).init_state(B, T)
    _, cache = applied(Attention(D))(params, x, cache)  # the same projections, every one kept
    apply = applied(mixer)
    state = mixer.init_state(B, T)
    for position in range(T):
        _, state = apply(params, x[:, position : position + 1], state)
        for p in range(max(0, position + 1 - window), position + 1):
            for name in "kv":
                ring, kept = np.asarray(state[name]), np.asarray(cache[name])
                np.testing.assert_allclose(ring[:, p % window], kept[:, p], atol=1e-5)
    whole = apply(params, x, mixer.init_state(B, T))[1]
    chex.assert_trees_all_close(whole, state, atol=1e-5)


def test_a_new_segment_empties_the_ring():
    mixer, x = SlidingWindow(D, window=4), inputs()
    params = parameters(mixer, x)
    apply = applied(mixer)
    one, two = jnp.ones((B, T), jnp.int32), jnp.zeros((B, T), jnp.int32).at[:, :2].set(2)
    _, state = apply(params, x, mixer.init_state(B, T), segment_ids=one)
    _, after = apply(params, x, state, segment_ids=two)
    _, fresh = apply(params, x, mixer.init_state(B, T), segment_ids=two)
    chex.assert_trees_all_close(after, fresh, atol=1e-6)
    assert not np.asarray(after["k"])[:, 2:].any()


def test_state_bytes_are_the_accounting_and_do_not_grow():
    for fields, width in ((dict(), D), (dict(num_heads=4, num_kv_heads=1), D // 4)):
        mixer = SlidingWindow(D, window=8, **fields)
        for length in (4, 1000):
            state = mixer.init_state(1, length, jnp.float32)
            assert state["k"].nbytes + state["v"].nbytes == 4 * mixer.legacy_state_elements(length)
            assert mixer.legacy_state_elements(length) == 2 * 8 * width


@pytest.mark.parametrize(("window", "published"), [(8, 9_728), (64, 67_072), (1024, 1_050_112)])
def test_legacy_bytes_are_those_of_the_published_points(window, published):
    """Width 128 with a short convolution of 3 taps before it."""
    elements = SlidingWindow(128, window=window).legacy_state_elements(1024) + 3 * 128
    assert 4 * elements == published


def test_dropout_is_on_iff_there_is_a_stream():
    mixer, x = SlidingWindow(D, window=4, dropout=0.5), inputs()
    params = parameters(mixer, x)
    off = applied(mixer)(params, x)[0]
    chex.assert_trees_all_close(off, applied(SlidingWindow(D, window=4))(params, x)[0], atol=1e-5)
    apply = jax.jit(lambda key: mixer.apply(params, x, rngs={"dropout": key})[0])
    on, again = (apply(jax.random.key(1)) for _ in range(2))
    chex.assert_trees_all_equal(on, again)
    assert not np.allclose(on, off)


def test_a_window_of_nothing_is_named():
    with pytest.raises(ValueError, match="at least 1"):
        SlidingWindow(D, window=0).init(jax.random.key(0), inputs())
