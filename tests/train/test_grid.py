"""A grid's points: each the run it would be alone, whatever the others do, in both forms and over eight devices."""

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from tests.train.test_sharding import on_eight_devices
from tests.train.tiny import tiny_config, tiny_model, tiny_task
from train.errors import UserError
from train.grid import check_mesh, make_grid
from train.sharding import AXES, make_mesh
from train.step import make_training

PROGRAM = 4
POINTS = ((0.01, 0), (0.01, 1), (1e30, 0))  # learning rate, seed; the last one blows up at once


def configs(**overrides):
    shared = {"model.embed_dropout": 0.1, "data.seed": 5, "steps": 60, **overrides}
    return [tiny_config(learning_rate=rate, seed=seed, **shared) for rate, seed in POINTS]


def grid_of(form, **overrides):
    listed = configs(**overrides)
    mesh = make_mesh(listed[0], jax.devices()[:1])
    return make_grid(listed, tiny_model(listed[0]), tiny_task(listed[0]), mesh, form)


def move(grid, state, counts, fresh=True):
    counts = np.array(counts, np.int32)
    state, report = grid.call(grid.points, state, {}, counts, np.bool_(fresh), program=PROGRAM)
    return state, grid.read(report)


@pytest.fixture(scope="module", params=["map", "vmap"])
def grid(request):
    return grid_of(request.param)


@pytest.fixture(scope="module")
def alone():
    """(losses of every call, state) of 52 steps of each point as a run of its own."""
    results = []
    for config in configs():
        mesh = make_mesh(config, jax.devices()[:1])
        training = make_training(config, tiny_model(config), tiny_task(config), mesh)
        state, losses = training.init(), []
        for _ in range(13):
            state, report = training.call(state, {}, np.int32(4), np.True_, program=PROGRAM)
            losses.append(training.read(report).means.get("loss"))
        results.append((losses, state))
    return results


def test_every_point_is_the_run_that_it_would_be_alone(grid, alone):
    """52 steps with dropout: own rates, own initial weights, own masks, one stream of batches, own end."""
    state, losses = grid.init(), []
    for _ in range(13):
        state, reports = move(grid, state, [4, 4, 4])
        losses.append([report.means.get("loss") for report in reports])
    for i in (0, 1):
        np.testing.assert_allclose([row[i] for row in losses], alone[i][0], rtol=1e-6)
        last = grid.take(state, i)
        assert int(last.step) == 52
        # float32, 52 steps of AdamW, whose normalisation magnifies the last bits of tiny gradients
        chex.assert_trees_all_close(last.params, alone[i][1].params, rtol=2e-4, atol=2e-6)
    assert losses[-1][0] != losses[-1][1]
    # the point that blew up took its last step where it does alone, and none after
    blown = grid.take(state, 2)
    assert reports[2].bad_streak == 4
    assert int(blown.step) == int(alone[2][1].step) < 8
    chex.assert_trees_all_close(blown.params, alone[2][1].params, rtol=1e-5)


def test_a_point_that_takes_no_step_stays_as_it_is_and_disturbs_nobody(grid):
    state = grid.init()
    start = jax.tree.map(np.asarray, grid.take(state, 1))
    state, _ = move(grid, state, [3, 0, 0])
    chex.assert_trees_all_equal(grid.take(state, 1), start)
    some = jax.tree.map(np.asarray, grid.take(state, 0))
    together, _ = move(grid, grid.init(), [3, 3, 3])
    chex.assert_trees_all_equal(grid.take(together, 0), some)


def test_the_best_states_are_kept_point_by_point(grid):
    state = grid.init()
    best = jax.tree.map(np.copy, state)
    state, _ = move(grid, state, [2, 2, 0])
    best = grid.keep(best, state, np.array([True, False, False]))
    assert [int(grid.take(best, i).step) for i in range(3)] == [2, 0, 0]
    chex.assert_trees_all_equal(grid.take(best, 0), grid.take(state, 0))


def five_points(count, form, **mesh):
    """What three calls of four steps come to on `count` devices; the second point ends after the first of them."""
    keys = {"data.seed": 3, **{f"mesh.{axis}": size for axis, size in mesh.items()}}
    listed = [tiny_config(learning_rate=0.001 * 2**i, seed=i, **keys) for i in range(5)]
    devices = make_mesh(listed[0], jax.devices()[:count])
    grid = make_grid(listed, tiny_model(listed[0]), tiny_task(listed[0]), devices, form)
    state, losses = grid.init(), []
    for i in range(3):
        counts = np.zeros(grid.size, int)
        counts[:5] = 4
        counts[1] *= i < 1
        state, reports = move(grid, state, counts)
        losses.append([report.means.get("loss", 0) for report in reports])
    steps = [int(grid.take(state, i).step) for i in range(5)]
    return {"size": grid.size, "losses": losses, "steps": steps}


EIGHT_DEVICES = """
import json
from tests.train.test_grid import five_points
print(json.dumps([five_points(8, form, data=4, fsdp=2) for form in ("map", "vmap")]))
"""


def test_eight_devices_share_the_points_and_give_the_losses_of_one():
    one = five_points(1, "map")
    assert one["steps"] == [12, 4, 12, 12, 12]
    for result in on_eight_devices(EIGHT_DEVICES):
        assert result["size"] == 8  # five points and three that pad
        assert result["steps"] == one["steps"]
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-6)


def test_a_rate_that_is_not_positive():
    listed = [tiny_config(), tiny_config(learning_rate=0.0)]
    mesh = make_mesh(listed[0], jax.devices()[:1])
    with pytest.raises(UserError, match=r"config\.learning_rate must be positive, got 0\.0"):
        make_grid(listed, tiny_model(listed[0]), tiny_task(listed[0]), mesh)


def test_models_that_are_split():
    check_mesh(AbstractMesh((2, 4, 1, 1), AXES))
    with pytest.raises(UserError, match=r"config\.mesh\.tensor and sequence must be 1"):
        check_mesh(AbstractMesh((2, 1, 2, 1), AXES))
