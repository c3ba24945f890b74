"""Generation: what it draws is what whole-sequence calls of the model say, however the prompts are batched."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.generate import _generate, filter_logits, generate
from jaxmodels.models.language_model import build_language_model

VOCAB = 37
MIXERS = [
    {"name": "base_conv", "kernel_size": 3},
    {"name": "based", "feature_dim": 4, "num_heads": 2},
    {"name": "sliding_window", "window": 4, "num_heads": 2},
    {"name": "attention", "num_heads": 2},
]


@pytest.fixture(scope="module")
def model_and_params():
    model = build_language_model(
        vocab_size=VOCAB, d_model=16, num_layers=4, mixers=MIXERS, initializer_range=0.5
    )
    return model, model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def prompts(shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 1, VOCAB)


def greedy_by_whole_calls(model, params, prompt, count):
    """The definition: every token from a call on all tokens before it, without any state."""
    tokens = prompt
    for _ in range(count):
        logits, _ = model.apply({"params": params}, tokens)
        tokens = jnp.concatenate([tokens, jnp.argmax(logits[:, -1:], -1)], axis=1)
    return tokens[:, prompt.shape[1] :]


def test_greedy_tokens_are_those_of_whole_calls(model_and_params):
    model, params = model_and_params
    prompt = prompts((3, 7))
    out = generate(model, params, prompt, max_new_tokens=6, temperature=0)
    expected = greedy_by_whole_calls(model, params, prompt, 6)
    chex.assert_trees_all_equal(out, expected)
    assert len(np.unique(np.asarray(out))) > 3  # weights are large enough for the rows to differ


def test_prompts_of_different_lengths_give_what_each_gives_alone(model_and_params):
    model, params = model_and_params
    prompt, lengths = prompts((3, 7)), jnp.array([7, 3, 1])
    poisoned = jnp.where(jnp.arange(7) < lengths[:, None], prompt, 5)
    out = generate(model, params, poisoned, max_new_tokens=5, lengths=lengths, temperature=0)
    for row, length in enumerate(lengths):
        alone = generate(
            model, params, prompt[row : row + 1, :length], max_new_tokens=5, temperature=0
        )
        chex.assert_trees_all_equal(out[row], alone[0])


def test_one_key_one_text_and_top_1_is_greedy(model_and_params):
    model, params = model_and_params
    draw = lambda seed, **more: generate(
        model, params, prompts((2, 5)), max_new_tokens=8, key=jax.random.key(seed), **more
    )
    chex.assert_trees_all_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    greedy = generate(model, params, prompts((2, 5)), max_new_tokens=8, temperature=0)
    chex.assert_trees_all_equal(draw(3, top_k=1), greedy)
    chex.assert_trees_all_equal(draw(3, top_p=1e-6), greedy)


def test_first_tokens_follow_the_models_distribution(model_and_params):
    model, params = model_and_params
    rows = 4000
    prompt = jnp.tile(prompts((1, 5)), (rows, 1))
    out = generate(model, params, prompt, max_new_tokens=1, key=jax.random.key(0), temperature=1.5)
    logits, _ = model.apply({"params": params}, prompt[:1])
    expected = np.asarray(jax.nn.softmax(logits[0, -1] / 1.5))
    found = np.bincount(np.asarray(out)[:, 0], minlength=VOCAB) / rows
    # 5 standard deviations of a share among `rows` draws
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / rows) + 1e-3).all()


def test_a_row_that_ended_stays_ended(model_and_params):
    model, params = model_and_params
    prompt = prompts((3, 7))
    free = np.asarray(generate(model, params, prompt, max_new_tokens=6, temperature=0))
    end = int(free[0, 2])
    out = np.asarray(
        generate(model, params, prompt, max_new_tokens=6, temperature=0, end_token=end)
    )
    for before, after in zip(free, out):
        stop = int(np.argmax(before == end)) + 1 if (before == end).any() else 6
        np.testing.assert_array_equal(after[:stop], before[:stop])
        assert (after[stop:] == end).all()


def test_a_second_call_compiles_nothing(model_and_params):
    model, params = model_and_params
    arguments = dict(max_new_tokens=3, temperature=0.7)
    generate(model, params, prompts((2, 4)), key=jax.random.key(0), **arguments)
    before = _generate._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    generate(model, params, prompts((2, 4), 9), key=jax.random.key(1), **arguments)
    after = _generate._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    assert after == before


def test_filter_keeps_the_nucleus():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    kept = lambda *a: np.isfinite(np.asarray(filter_logits(logits, *a)))[0].tolist()
    assert kept() == [True] * 4
    assert kept(2) == [False, True, False, True]
    assert kept(0, 0.4) == [False, True, False, False]  # .4 is at least .4
    assert kept(0, 0.5) == [False, True, False, True]
    assert kept(0, 0.71) == [False, True, True, True]
    assert kept(3, 0.99) == [False, True, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompt=jnp.zeros((1, 0), jnp.int32)), "at least one token"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(temperature=-1), "temperature must not be negative"),
        (dict(top_k=-1), "top_k must be 0"),
        (dict(top_p=0), r"top_p must be in \(0, 1\]"),
        (dict(key=None), "needs a key"),
        (dict(lengths=jnp.array([5])), "from 1 to 4"),
    ],
)
def test_bad_arguments(model_and_params, changes, message):
    model, params = model_and_params
    given = dict(prompt=prompts((1, 4)), max_new_tokens=2, key=jax.random.key(0)) | changes
    with pytest.raises(ValueError, match=message):
        generate(model, params, given.pop("prompt"), **given)


def test_more_tokens_than_positions():
    model = build_language_model(
        vocab_size=VOCAB, d_model=8, num_layers=1, mixers=MIXERS[:1], max_positions=6
    )
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    with pytest.raises(ValueError, match="do not fit the 6 learned positions"):
        generate(model, params, prompts((1, 4)), max_new_tokens=3, temperature=0)
