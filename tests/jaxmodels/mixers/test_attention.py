"""What is particular to softmax attention: its heads, rotary, dropout, cache. The law is in test_law.py.

Run: pytest tests/jaxmodels/mixers/test_attention.py
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.mixers import attention as module
from jaxmodels.mixers.attention import Attention
from jaxmodels.mixers.rotary import rotate

B, T, D = 2, 9, 16


def initial(mixer, x):
    """Compiled: eager initialisation compiles every op of it."""
    return jax.jit(mixer.init)(jax.random.key(0), x)


def inputs(t=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, t, D)))


def written_out(params, x, heads, groups):
    """Attention from the parameters' names and their order, (3, h, d_h) as in zoology, one head at a time."""
    width = D // heads
    x = np.asarray(x, np.float64)
    dense = lambda name: x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
    if heads == groups:
        q, k, v = np.split(dense("Wqkv"), 3, axis=-1)
    else:
        q, (k, v) = dense("Wq"), np.split(dense("Wkv"), 2, axis=-1)
    y = np.zeros_like(x)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        group = head // (heads // groups)
        shared = slice(group * width, (group + 1) * width)
        s = np.einsum("btk,bsk->bts", q[..., own], k[..., shared]) / np.sqrt(width)
        s = np.where(np.tril(np.ones(s.shape[1:], bool)), s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        y[..., own] = p / p.sum(-1, keepdims=True) @ v[..., shared]
    return y @ np.asarray(params["out_proj"]["kernel"]) + np.asarray(params["out_proj"]["bias"])


@pytest.mark.parametrize(("heads", "groups"), [(1, None), (4, None), (4, 2), (4, 1)])
def test_heads_and_parameters_are_those_of_the_papers(heads, groups):
    with jax.enable_x64(True):
        mixer = Attention(D, num_heads=heads, num_kv_heads=groups, param_dtype=jnp.float64)
        x = inputs()
        params = initial(mixer, x)["params"]
        names = {"Wqkv", "out_proj"} if groups is None else {"Wq", "Wkv", "out_proj"}
        assert set(params) == names
        # Biases start at 0; give them values, so that a swapped one shows.
        params = jax.tree.map(lambda p: p + jnp.linspace(-1, 1, p.size).reshape(p.shape), params)
        y, _ = jax.jit(mixer.apply)({"params": params}, x)
        wanted = written_out(params, x, heads, groups or heads)
        np.testing.assert_allclose(y, wanted, rtol=1e-11)


def test_biases():
    x = inputs()
    make = lambda use_bias: Attention(D, use_bias=use_bias).init
    names = lambda use_bias: jax.tree.map(
        jnp.shape, jax.eval_shape(make(use_bias), jax.random.key(0), x)["params"]
    )
    assert names(True)["Wqkv"] == {"kernel": (D, 3 * D), "bias": (3 * D,)}
    assert names(False)["Wqkv"] == {"kernel": (D, 3 * D)}
    assert names(False)["out_proj"] == {"kernel": (D, D), "bias": (D,)}


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_rotary_is_a_rotation_in_the_complex_plane(fraction):
    width = 8
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 2, width))
    positions = np.array([[0, 1, 2, 700, 30_000]])
    n = int(fraction * width) // 2
    turns = np.exp(1j * positions[..., None, None] * 10_000.0 ** (-np.arange(n) / n))
    z = (x[..., :n] + 1j * x[..., n : 2 * n]) * turns
    wanted = np.concatenate([z.real, z.imag, x[..., 2 * n :]], axis=-1)
    with jax.enable_x64(True):
        y = rotate(jnp.asarray(x), jnp.asarray(positions), fraction)
        np.testing.assert_allclose(y, wanted, atol=1e-11)
    # In bfloat16 the angles are still float32's: 2^-9 for each of the two roundings, on values of about 3.
    narrow = rotate(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions), fraction)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), wanted, atol=0.03)


def test_rotary_scores_depend_on_the_distance_only():
    q, k = (jnp.asarray(x) for x in np.random.default_rng(1).normal(size=(2, 1, 1, 1, 8)))
    score = lambda i, j: jnp.sum(
        rotate(q, jnp.array([[i]]), 1.0) * rotate(k, jnp.array([[j]]), 1.0)
    )
    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rotary_of_an_odd_number_of_components_is_that_of_the_published_checkpoints():
    """Half of a head of 70: int(35) gives 18 frequencies base^(-2 i / 35), which turn 36 components."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 1, 1, 70)), jnp.float32)
    y = rotate(x, jnp.array([[1]]), 0.5)
    moved = np.flatnonzero(np.asarray(x != y)[0, 0, 0])
    assert moved.tolist() == list(range(36))
    angle = 10_000.0 ** (-2 * 17 / 35)
    last = x[..., 17] * np.cos(angle) - x[..., 35] * np.sin(angle)
    np.testing.assert_allclose(y[..., 17], last, rtol=1e-6)


@pytest.mark.parametrize(("width", "fraction"), [(8, 1.5), (8, -0.1), (5, 1.0)])
def test_impossible_rotary_is_named(width, fraction):
    with pytest.raises(ValueError, match="rotary_fraction"):
        rotate(jnp.zeros((1, 1, 1, width)), jnp.zeros((1, 1), jnp.int32), fraction)


def test_state_bytes_are_the_accounting():
    for fields, width in ((dict(), D), (dict(num_heads=4, num_kv_heads=2), D // 2)):
        mixer = Attention(D, **fields)
        state = mixer.init_state(1, 100, jnp.float32)
        assert state["k"].nbytes + state["v"].nbytes == 4 * mixer.legacy_state_elements(100)
        assert mixer.legacy_state_elements(100) == 2 * width * 100
    assert Attention(D).init_state(1, 100, jnp.bfloat16)["k"].dtype == jnp.bfloat16


def test_a_full_cache_is_an_error_when_concrete_and_drops_under_jit():
    mixer, x = Attention(D), inputs(1)
    params = initial(mixer, x)
    state = mixer.init_state(B, 2)
    for _ in range(2):
        _, state = mixer.apply(params, x, state)
    with pytest.raises(ValueError, match="3 tokens do not fit a cache of max_len=2"):
        mixer.apply(params, x, state)
    y, after = jax.jit(mixer.apply)(params, x, state)
    chex.assert_tree_all_finite((y, after))
    chex.assert_trees_all_equal(after["k"], state["k"])


def test_decoding_moves_no_cache():
    """One step needs temporaries far below the cache, with and without segment ids: nothing of its size is copied."""
    mixer, length = Attention(D, num_heads=2), 4096
    x = inputs(1).astype(jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)
    state = jax.eval_shape(lambda: mixer.init_state(B, length))
    for ids in (None, jnp.ones((B, 1), jnp.int32)):
        step = lambda params, x, state: mixer.apply(params, x, state, segment_ids=ids)  # noqa: B023
        step = jax.jit(step, donate_argnums=2).lower(params, x, state).compile()
        assert step.memory_analysis().temp_size_in_bytes < 4 * B * length * D / 2


def test_prefill_of_an_empty_cache_gives_what_the_whole_program_gives(monkeypatch):
    """Long calls on an empty cache take a branch that does not read it; both branches against no state at all."""
    mixer, x = Attention(D, num_heads=2, rotary_fraction=1.0), inputs().astype(jnp.float32)
    params = initial(mixer, x)
    monkeypatch.setattr(module, "PREFILL", 4)
    apply = jax.jit(mixer.apply)
    whole, _ = apply(params, x)
    first, state = apply(params, x[:, :5], mixer.init_state(B, T))
    second, _ = apply(params, x[:, 5:], state)
    chex.assert_trees_all_close(jnp.concatenate([first, second], 1), whole, atol=1e-6)


def test_dropout_is_on_iff_there_is_a_stream():
    mixer, x = Attention(D, dropout=0.5), inputs()
    params = initial(mixer, x)
    # The state of initialisation hides weights of .02 behind rounding.
    params = jax.tree.map(lambda p: 20 * p, params)
    apply = jax.jit(lambda key: mixer.apply(params, x, rngs=key)[0])
    off = apply(None)
    chex.assert_trees_all_close(off, jax.jit(Attention(D).apply)(params, x)[0], atol=1e-5)
    on, again, other = (apply({"dropout": jax.random.key(i)}) for i in (1, 1, 2))
    chex.assert_trees_all_equal(on, again)
    assert not np.allclose(on, off)
    assert not np.allclose(on, other)
    many = jax.vmap(lambda key: apply({"dropout": key}))(jax.random.split(jax.random.key(3), 2000))
    spread = many.std(0).max()
    assert np.abs(many.mean(0) - off).max() < 5 * spread / np.sqrt(2000)  # unbiased


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(num_heads=3), "num_heads=3"), (dict(num_heads=4, num_kv_heads=3), "num_kv_heads=3")],
)
def test_heads_that_do_not_divide_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Attention(D, **fields).init_state(1, 1)
