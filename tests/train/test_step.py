"""The compiled step: grouping, accumulation, skipping, clipping, donation, and the rule of a plain loop in optax."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.tiny import tiny_config, tiny_loss, tiny_model, tiny_task
from train.config import base_config
from train.sharding import make_mesh
from train.step import dropout_key, make_training

PROGRAM = 4


def training_of(traces: int | None = None, bad_steps=(), **overrides):
    """A Training of the tiny task whose batch function must not be traced more than `traces` times."""
    config = tiny_config(**overrides)
    config.data.bad_steps = bad_steps
    task = tiny_task(config)
    if traces:
        task = dataclasses.replace(task, batch=chex.assert_max_traces(task.batch, n=traces))
    mesh = make_mesh(config, jax.devices()[:1])
    return make_training(config, tiny_model(config), task, mesh)


@pytest.fixture(scope="module")
def plain():
    return training_of()


@pytest.fixture(scope="module")
def spoiled():
    """Steps 2, 5, 6, 7, 8 and 9 have no finite gradient; three in a row are tolerated."""
    return training_of(bad_steps=(2, 5, 6, 7, 8, 9))


def steps(training, *counts, state=None, fresh=True):
    """The state after these calls, and the report of the last."""
    state = training.init() if state is None else state
    for i, count in enumerate(counts):
        state, report = training.call(
            state, {}, np.int32(count), np.bool_(fresh and i == 0), program=PROGRAM
        )
    return state, training.read(report)


def test_how_steps_are_grouped_changes_no_bit(plain):
    expected, report = steps(plain, 7)
    for counts in ((1,) * 7, (3, 4), (4, 2, 1)):
        state, other = steps(plain, *counts)
        chex.assert_trees_all_equal(state, expected)
        assert other == report


def test_no_count_compiles_again():
    # one trace finds the metrics' names, one the loop's body
    training = training_of(traces=2)
    steps(training, 1, 3, 2, 4)
    assert training.call._cache_size() == 1


def test_the_state_is_donated(plain):
    state = plain.init()
    leaves = jax.tree.leaves(state)
    steps(plain, 2, state=state)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_same_as_a_plain_loop(plain):
    """Given AdamW of optax with its own cosine schedule, when stepped one by one, then the same parameters come out."""
    config = tiny_config()
    model, task = tiny_model(config), tiny_task(config)
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adamw(rate, weight_decay=config.optimizer.weight_decay)
    params = plain.init().params
    state, losses, norms = optimizer.init(params), [], []

    @jax.jit
    def one(params, state, step):
        batch = task.batch(PROGRAM, {}, step, 0)
        loss = lambda p: tiny_loss(model, p, batch, None)
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics, optax.tree.norm(grads)

    for step in range(5):
        params, state, metrics, norm = one(params, state, jnp.int32(step))
        losses.append(metrics["loss"])
        norms.append(norm)
    actual, report = steps(plain, 5)
    # float32; the order of multiplying by the rate differs by one rounding a step
    chex.assert_trees_all_close(actual.params, params, rtol=1e-5, atol=1e-7)
    total, count = (sum(parts) for parts in zip(*losses))
    assert report.means["loss"] == pytest.approx(float(total / count), rel=1e-6)
    assert report.means["grad_norm"] == pytest.approx(float(sum(norms) / 5), rel=1e-5)
    rates = [float(rate(step)) for step in range(5)]
    assert report.means["learning_rate"] == pytest.approx(sum(rates) / 5, rel=1e-6)


def test_sums_go_on_until_the_log_line(plain):
    state, first = steps(plain, 2)
    state, both = steps(plain, 3, state=state, fresh=False)
    state, alone = steps(plain, 2, state=state, fresh=True)
    assert both.sums["grad_norm"][1] == 5
    assert alone.sums["grad_norm"][1] == 2
    assert first.sums["grad_norm"][1] == 2


def test_accumulated_parts_give_the_whole_batchs_gradient(plain):
    """The parts hold different numbers of labels, so an unweighted mean of means would be wrong by percents."""
    whole, report = steps(plain, 3)
    parts, parted = steps(training_of(**{"optimizer.accumulate": 4}), 3)
    # float32 sums in another order, through three AdamW steps whose normalisation magnifies tiny gradients
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-4, atol=1e-5)
    assert parted.means == pytest.approx(report.means, rel=1e-5)


def test_a_step_without_a_finite_gradient_changes_nothing_but_the_count(spoiled):
    before, _ = steps(spoiled, 2)
    kept = jax.tree.map(np.asarray, before)
    after, report = steps(spoiled, 1, state=before, fresh=False)
    chex.assert_trees_all_equal(after.params, kept.params)
    chex.assert_trees_all_equal(after.opt_state, kept.opt_state)
    chex.assert_trees_all_equal(after.sums, kept.sums)
    assert (int(after.step), report.skipped, report.bad_streak) == (3, 1, 1)
    after, report = steps(spoiled, 1, state=after, fresh=False)
    assert (int(after.step), report.skipped, report.bad_streak) == (4, 1, 0)
    assert all(np.isfinite(value) for value in report.means.values())


def test_too_many_in_a_row_stop_the_device_at_that_step(spoiled):
    state, report = steps(spoiled, 30)
    assert (int(state.step), report.bad_streak, report.skipped) == (9, 4, 5)
    kept = jax.tree.map(np.asarray, state)
    state, report = steps(spoiled, 5, state=state, fresh=False)  # one that was already queued
    chex.assert_trees_all_equal(state, kept)


def test_clipping_bounds_the_gradient_and_logs_it_as_it_was(plain):
    _, free = steps(plain, 1)
    sgd = {"optimizer.name": "sgd", "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0}
    clipped = training_of(**sgd, **{"optimizer.clip_norm": 0.25})
    start = jax.tree.map(np.asarray, clipped.init().params)
    state, report = steps(clipped, 1)
    moved = jax.tree.map(lambda a, b: a - b, state.params, start)
    norm = float(optax.tree.norm(moved)) / report.means["learning_rate"]
    assert free.means["grad_norm"] > 0.5
    assert report.means["grad_norm"] == pytest.approx(free.means["grad_norm"], rel=1e-6)
    assert norm == pytest.approx(0.25, rel=1e-4)


def test_dropout_draws_by_step_and_only_where_there_is_some(plain):
    dropping = training_of(**{"model.embed_dropout": 0.5})
    once, _ = steps(dropping, 4)
    again, _ = steps(dropping, 1, 3)
    chex.assert_trees_all_equal(once, again)
    without, _ = steps(plain, 4)
    assert not np.allclose(once.params["embed"]["embedding"], without.params["embed"]["embedding"])


@pytest.mark.parametrize(
    ("mixers", "embed", "expected"),
    [
        ([{"name": "attention"}], 0.0, False),
        ([{"name": "attention"}], 0.1, True),
        ([{"name": "based"}, {"name": "attention", "dropout": 0.1}], 0.0, True),
        ([{"name": "attention", "dropout": 0.0}], 0.0, False),
    ],
)
def test_where_dropout_is_found(mixers, embed, expected):
    config = base_config()
    config.model.mixers = mixers
    config.model.embed_dropout = embed
    config.model.resid_dropout = 0.0
    assert (dropout_key(config) is not None) == expected
