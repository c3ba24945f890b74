"""Optimisers against the formulas written out in numpy float64, schedules against their definitions."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from train.config import base_config
from train.errors import UserError
from train.optimizer import decay_matrices, make_optimizer, make_schedule, steps_per_epoch

RATE, DECAY, STEPS = 0.05, 0.1, 5
# Parameters near 1, moved by RATE a step. Float32 knows AdamW's 1 - b2^t = .001 to 6e-5, so a move to 3e-5 RATE = 2e-6.
RTOL, ATOL = 1e-6, 4e-6


def config_with(**optimizer) -> ConfigDict:
    config = base_config()
    for key, value in optimizer.items():
        target = config if key in ("steps", "learning_rate", "batch_size") else config.optimizer
        target[key] = value
    return config


def build(config):
    make_optimizer(config)
    make_schedule(config)


def trajectory(config, params, gradients):
    """Parameters after each step p <- p + RATE u, as train.step applies them."""
    optimizer = make_optimizer(config)
    params = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    state, seen = optimizer.init(params), []
    for grads in gradients:
        grads = {name: jnp.asarray(g, jnp.float32) for name, g in grads.items()}
        updates, state = optimizer.update(grads, state, params)
        params = {name: params[name] + RATE * updates[name] for name in params}
        seen.append(params)
    return seen


def numpy_adamw(p, grads, decay, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        p = p - RATE * decay * p  # torch.optim.AdamW decays first; it is the same sum
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - RATE * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        yield p


def numpy_sgd(p, grads, decay, momentum=0.9):
    m = 0.0
    for g in grads:
        m = momentum * m + g
        p = p - RATE * (m + decay * p)
        yield p


def numpy_lion(p, grads, decay, b1=0.9, b2=0.999):
    m = 0.0
    for g in grads:
        p = p - RATE * (np.sign(b1 * m + (1 - b1) * g) + decay * p)
        m = b2 * m + (1 - b2) * g
        yield p


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (6, 4), "kernel": (4, 4), "bias": (4,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(STEPS)]
    return params, gradients


@pytest.mark.parametrize("mask", ["all", "matrices"])
@pytest.mark.parametrize(
    ("name", "formula"), [("adamw", numpy_adamw), ("sgd", numpy_sgd), ("lion", numpy_lion)]
)
def test_formula(problem, name, formula, mask):
    params, gradients = problem
    config = config_with(name=name, weight_decay=DECAY, decay_mask=mask)
    actual = trajectory(config, params, gradients)
    for leaf, p in params.items():
        decay = DECAY if mask == "all" or leaf == "kernel" else 0.0
        expected = formula(p, [g[leaf] for g in gradients], decay)
        for step, value in enumerate(expected):
            np.testing.assert_allclose(actual[step][leaf], value, RTOL, ATOL, err_msg=leaf)


def test_muon_orthogonalises_the_matrices_and_leaves_the_rest_to_adamw(problem):
    params, gradients = problem
    config = config_with(name="muon", weight_decay=0.0)
    after = trajectory(config, params, gradients[:1])[0]
    move = {name: (after[name] - params[name]) / RATE for name in params}
    # five Newton-Schulz steps bring every singular value into about [.5, 1.5]; the scale is .2 sqrt(max(m, n))
    singular = np.linalg.svd(move["kernel"], compute_uv=False) / (0.2 * math.sqrt(4))
    assert (singular > 0.4).all(), singular
    assert (singular < 1.6).all(), singular
    for name in ("embedding", "bias"):  # AdamW's first step is the gradient's sign
        np.testing.assert_allclose(move[name], -np.sign(gradients[0][name]), atol=1e-5)


def test_muon_decays_by_the_same_mask(problem):
    params, gradients = problem
    for mask, decayed in (("all", {"embedding", "kernel", "bias"}), ("matrices", {"kernel"})):
        with_decay, without = (
            trajectory(
                config_with(name="muon", weight_decay=decay, decay_mask=mask), params, gradients[:1]
            )[0]
            for decay in (DECAY, 0.0)
        )
        for name, p in params.items():
            expected = -RATE * DECAY * p if name in decayed else np.zeros_like(p)
            np.testing.assert_allclose(with_decay[name] - without[name], expected, atol=1e-6)


def test_matrices_are_neither_embeddings_nor_heads_nor_vectors():
    tree = {
        "embed": {"embedding": np.zeros((8, 4))},
        "lm_head": {"kernel": np.zeros((4, 8))},
        "layers_0": {"mixer": {"kernel": np.zeros((4, 4)), "bias": np.zeros(4)}},
    }
    assert decay_matrices(tree) == {
        "embed": {"embedding": False},
        "lm_head": {"kernel": False},
        "layers_0": {"mixer": {"kernel": True, "bias": False}},
    }


def rates(**optimizer):
    config = config_with(learning_rate=2.0, **optimizer)
    schedule = make_schedule(config)
    return np.array([float(schedule(jnp.int32(step))) for step in range(config.steps)])


def test_constant_and_warmup():
    np.testing.assert_allclose(
        rates(steps=6, schedule="constant", warmup_steps=4), [0.5, 1, 1.5, 2, 2, 2]
    )


def test_cosine():
    actual = rates(steps=12, schedule="cosine", warmup_steps=2, final_fraction=0.1)
    x = np.clip((np.arange(12) - 2) / 10, 0, 1)
    expected = (
        2 * (0.1 + 0.9 * (1 + np.cos(np.pi * x)) / 2) * np.minimum(1, (np.arange(12) + 1) / 2)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_warmup_stable_decay():
    actual = rates(steps=10, schedule="wsd", warmup_steps=2, decay_steps=4, final_fraction=0.0)
    np.testing.assert_allclose(actual, [1, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5])


def test_cosine_per_epoch_is_torchs_recursion():
    """eta_e = eta_(e-1) (1 + cos(pi e / E)) / (1 + cos(pi (e - 1) / E)): CosineAnnealingLR with eta_min 0, step by step."""
    epochs, length = 5, 3
    expected, rate = [], 2.0
    for epoch in range(epochs):
        if epoch:
            rate *= (1 + math.cos(math.pi * epoch / epochs)) / (
                1 + math.cos(math.pi * (epoch - 1) / epochs)
            )
        expected += [rate] * length
    actual = rates(steps=epochs * length, schedule="cosine_per_epoch", steps_per_epoch=length)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_an_epoch_is_one_pass_over_the_segments():
    config = config_with(batch_size=256)
    config.data.train = tuple(
        {"length": 64, "num_kv_pairs": 4, "num_examples": n} for n in (100_000, 20_000, 20_000)
    )
    assert steps_per_epoch(config) == 391 + 79 + 79
    config.data.train[1]["num_examples"] = None
    with pytest.raises(UserError, match="steps_per_epoch"):
        steps_per_epoch(config)


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        ("name", "adam", "adamw, lion, muon, sgd"),
        ("schedule", "linear", "constant, cosine, cosine_per_epoch, wsd"),
        ("decay_mask", "some", "all, matrices"),
    ],
)
def test_unknown_names_list_the_choices(key, value, choices):
    config = config_with(**{key: value})
    with pytest.raises(
        UserError, match=f"config.optimizer.{key}='{value}' is not one of {choices}"
    ):
        build(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(b1=1.0), "b1 must be in"),
        (dict(weight_decay=-1.0), "weight_decay must not be negative"),
        (dict(learning_rate=0.0), "learning_rate must be positive"),
        (dict(steps=10, warmup_steps=10), "warmup_steps=10"),
        (dict(steps=10, schedule="wsd", warmup_steps=6, decay_steps=5), "decay_steps=5"),
    ],
)
def test_numbers_out_of_range(settings, message):
    config = config_with(**settings)
    with pytest.raises(UserError, match=message):
        build(config)
