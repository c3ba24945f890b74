"""The chunked cross-entropy against the plain one in float64, values and gradients, whatever the chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import cross_entropy as module
from train.cross_entropy import cross_entropy

ROWS, WIDTH, VOCAB = 21, 6, 40


def head(params, rows):
    """A tied embedding and a bias; `unused` is not read."""
    return rows @ params["embedding"].T + params["bias"]


def arguments(dtype, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "embedding": jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), dtype),
        "bias": jnp.asarray(rng.normal(size=VOCAB), dtype),
        "unused": jnp.asarray(rng.normal(size=(5, 3)), dtype),
    }
    rows = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), dtype)
    labels = rng.integers(0, VOCAB, ROWS).astype(np.int32)
    labels[::4] = -100
    return params, rows, jnp.asarray(labels)


def plain(params, rows, labels):
    logits = head(params, rows)
    own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
    return jnp.sum(jnp.where(labels >= 0, jax.nn.logsumexp(logits, 1) - own, 0))


# chunk sizes are read when a function is traced, so they are static here
@functools.partial(jax.jit, static_argnums=3)
def value(params, rows, labels, sizes=None):
    return cross_entropy(head, params, rows, labels)


def scaled(function):
    """A cotangent other than one, so that its use is tested too."""
    return lambda *args: 0.3 * function(*args)


@pytest.fixture(params=[4, 5, 1000], ids=lambda rows: f"chunks of {rows}")
def chunks(request, monkeypatch):
    monkeypatch.setattr(module, "_CPU_LEAST_ROWS", request.param)
    monkeypatch.setattr(module, "_CPU_CHUNK", 1)
    return request.param


def test_value_and_gradients_are_the_plain_ones(chunks):
    with jax.enable_x64(True):
        params, rows, labels = arguments(np.float64)
        total = lambda p, r: cross_entropy(head, p, r, labels)[0]
        got, (d_params, d_rows) = jax.jit(jax.value_and_grad(scaled(total), (0, 1)))(params, rows)
        want, (w_params, w_rows) = jax.value_and_grad(
            scaled(lambda p, r: plain(p, r, labels)), (0, 1)
        )(params, rows)
    # float64 throughout: sums of 16 terms of order 1
    np.testing.assert_allclose(got, want, rtol=1e-13)
    np.testing.assert_allclose(d_rows, w_rows, rtol=0, atol=1e-13)
    for name in params:
        np.testing.assert_allclose(d_params[name], w_params[name], rtol=0, atol=1e-13)
    assert not np.asarray(d_params["unused"]).any()
    assert not np.asarray(d_rows)[::4].any()


def test_correct_rows_and_the_value_without_a_gradient(chunks):
    params, rows, labels = arguments(np.float32)
    best = np.argmax(np.asarray(head(params, rows)), 1)
    labels = np.array(labels)
    labels[1::4] = best[1::4]
    total, correct = value(params, rows, jnp.asarray(labels), chunks)
    np.testing.assert_array_equal(correct, (labels == best) & (labels >= 0))
    assert correct.sum() >= len(labels[1::4])
    # float32: 16 terms of order 5
    np.testing.assert_allclose(total, plain(params, rows, jnp.asarray(labels)), rtol=1e-6)


def test_a_tie_is_not_correct():
    params, rows, _ = arguments(np.float32)
    labels = jnp.zeros(ROWS, jnp.int32)
    constant = lambda p, r: jnp.zeros((len(r), VOCAB))
    total, correct = jax.jit(lambda r: cross_entropy(constant, params, r, labels))(rows)
    assert not correct.any()
    np.testing.assert_allclose(total, ROWS * np.log(VOCAB), rtol=1e-6)


def test_a_row_without_a_label_cannot_spoil_anything():
    params, rows, labels = arguments(np.float32)
    rows = rows.at[::4].set(jnp.nan)
    total = lambda p, r: cross_entropy(head, p, r, labels)[0]
    out = jax.jit(jax.value_and_grad(total, (0, 1)))(params, rows)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


def test_a_nan_under_a_label_is_seen():
    params, rows, labels = arguments(np.float32)
    total, correct = value(params, rows.at[1].set(jnp.nan), labels)
    assert np.isnan(total)
    assert not correct[1]


def test_low_precision_heads_are_summed_in_float32():
    params, rows, labels = arguments(np.float32)
    low = lambda p, r: head(*jax.tree.map(lambda x: x.astype(jnp.bfloat16), (p, r)))
    total = lambda p, r: cross_entropy(low, p, r, labels)[0]
    got, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(params, rows)
    assert got.dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(lambda x: x.dtype, (params, rows))
    want = plain(params, rows, labels)
    # logits of order 3 rounded to 8 bits
    np.testing.assert_allclose(got, want, rtol=1e-2)
