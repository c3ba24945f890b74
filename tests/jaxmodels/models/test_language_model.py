"""The language model: one call for training, prefill and decoding; padding anywhere; Zoology's initialisation.

Run: pytest tests/jaxmodels/models
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.models.language_model import build_language_model

HYBRID = [{"name": "base_conv", "kernel_size": 3}, {"name": "based", "feature_dim": 4}]
FIELDS = dict(vocab_size=31, d_model=16, num_layers=2, mixers=HYBRID)


def make(**changes):
    model = build_language_model(**(FIELDS | changes))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 31)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    return model, params, tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(max_positions=12, channel="identity"),
        dict(norm="rmsnorm", channel="swiglu", tie_embeddings=False),
        dict(channel="mlp", channel_multiplier=2.0, remat=True),
    ],
)
def test_decoding_token_by_token_gives_the_logits_of_one_call(changes):
    model, params, tokens = make(**changes)
    apply = jax.jit(lambda tokens, state: model.apply(params, tokens, state))
    whole, nothing = apply(tokens, None)
    chex.assert_shape(whole, (2, 12, 31))
    assert nothing is None
    empty = state = model.init_state(2, 12)
    rows = []
    for i in range(12):
        logits, state = apply(tokens[:, i : i + 1], state)
        rows.append(logits)
    chex.assert_trees_all_equal_shapes_and_dtypes(empty, state)
    # float32: logits of order 1e-2 from sums of a few hundred products
    np.testing.assert_allclose(np.concatenate(rows, 1), whole, atol=1e-6)


def test_left_padding_interior_padding_and_packing_do_not_move_logits():
    model, params, tokens = make(max_positions=12)
    apply = jax.jit(lambda tokens, ids: model.apply(params, tokens, None, ids)[0])
    alone = apply(tokens[:, :5], jnp.ones((2, 5), jnp.int32))
    padded = jnp.zeros((2, 12), jnp.int32).at[:, [2, 3, 6, 7, 9]].set(tokens[:, :5])
    ids = jnp.zeros((2, 12), jnp.int32).at[:, [2, 3, 6, 7, 9]].set(1)
    np.testing.assert_allclose(apply(padded, ids)[:, [2, 3, 6, 7, 9]], alone, atol=1e-6)
    packed = jnp.concatenate([tokens[:, 5:], tokens[:, :5]], axis=1)
    ids = jnp.array([[1] * 7 + [2] * 5] * 2)
    np.testing.assert_allclose(apply(packed, ids)[:, 7:], alone, atol=1e-6)


def test_the_head_on_some_rows_is_the_head_on_all_of_them():
    model, params, tokens = make()
    hidden, _ = model.apply(params, tokens, method="hidden")
    rows = model.apply(params, hidden[:, 3:5], method="head")
    np.testing.assert_array_equal(rows, model.apply(params, tokens)[0][:, 3:5])


def test_initialisation_is_zoologys():
    """N(0, .02) for embeddings and projections, .02 / sqrt(2 layers) for out_proj, zero biases, unit norms."""
    mixers = [{"name": "attention"}, {"name": "based", "feature_dim": 16}]
    model = build_language_model(
        vocab_size=512, d_model=128, num_layers=2, mixers=mixers, channel="mlp", max_positions=8
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    flat = {"/".join(map(str, path)): p for path, p in _flat(params)}
    assert any("position_embed" in path for path in flat)
    for path, p in flat.items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(p, 1)
        elif path.endswith("bias"):
            np.testing.assert_array_equal(p, 0)
        else:
            std = 0.02 / 2 if "out_proj" in path or "fc2" in path else 0.02
            # five standard errors of an estimated deviation, std / sqrt(2 n)
            assert abs(p.std() - std) < 5 * std / np.sqrt(2 * p.size), path
            assert abs(p.mean()) < 5 * std / np.sqrt(p.size), path


def _flat(params):
    for path, p in jax.tree.leaves_with_path(params):
        yield [k.key for k in path], np.asarray(p)


def test_channel_identity_adds_the_norm_itself():
    """Zoology's Identity state mixer: the block adds norm2(x). Written out for a one-layer model."""
    model, params, tokens = make(num_layers=1, channel="identity")
    p = params["params"]
    _, seen = model.apply(params, tokens, mutable="intermediates")
    mixed = seen["intermediates"]["layers_0"]["mixer_out"][0]

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    x = np.asarray(p["embed"]["embedding"])[tokens] + np.asarray(mixed)
    expected = norm(x + norm(x)) @ np.asarray(p["embed"]["embedding"]).T
    np.testing.assert_allclose(model.apply(params, tokens)[0], expected, atol=1e-5)


def test_dropout_is_on_exactly_when_there_is_a_key():
    model, params, tokens = make(embed_dropout=0.5, resid_dropout=0.5)
    plain = make()[0].apply(params, tokens)[0]
    np.testing.assert_array_equal(model.apply(params, tokens)[0], plain)
    dropped = [
        model.apply(params, tokens, rngs={"dropout": jax.random.key(i)})[0] for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.allclose(dropped[0], plain)
    assert not np.allclose(dropped[0], dropped[2])


def test_bfloat16_computes_narrow_and_answers_wide():
    model, params, tokens = make(dtype="bfloat16")
    logits, _ = jax.jit(model.apply)(params, tokens)
    assert logits.dtype == jnp.float32
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    exact = make()[0].apply(params, tokens)[0]
    # 8 bits of mantissa through two layers: a few percent of the largest logit
    np.testing.assert_allclose(logits, exact, atol=0.05 * np.abs(exact).max())


def test_remat_changes_no_gradient():
    model, params, tokens = make()
    again = make(remat=True)[0]
    gradients = [
        jax.jit(jax.grad(lambda p, m=m: jnp.sum(m.apply(p, tokens)[0] ** 2)))(params)
        for m in (model, again)
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(mixers=[{"name": "atention"}]),
            "unknown mixer 'atention'; there are attention, base",
        ),
        (dict(mixers=[{"name": "based", "feature_dims": 8}]), "did you mean 'feature_dim'"),
        (dict(mixers=[]), "empty"),
        (dict(d_modl=8), "did you mean 'd_model'"),
        (dict(norm="batchnorm"), "layernorm, rmsnorm"),
        (dict(channel="glu"), "identity, mlp, swiglu"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build_language_model(**(FIELDS | changes))


def test_more_tokens_than_learned_positions_is_an_error():
    model = build_language_model(**FIELDS, max_positions=4)
    with pytest.raises(ValueError, match="4 learned positions"):
        model.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))


def test_based_can_keep_the_output_range_of_zoologys_figures():
    mixers = [{"name": "based", "feature_dim": 8, "out_range": 0.02}]
    model = build_language_model(vocab_size=8, d_model=128, num_layers=2, mixers=mixers)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    kernel = params["layers_0"]["mixer"]["out_proj"]["kernel"]
    assert abs(kernel.std() - 0.02) < 5 * 0.02 / np.sqrt(2 * kernel.size)
