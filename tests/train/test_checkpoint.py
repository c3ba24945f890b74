"""Checkpoints: what is kept, what comes back, and what happens to damaged, foreign and half-written ones, or no space."""

import os
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_sharding import ROOT, python_path
from tests.train.tiny import tiny_config, tiny_model, tiny_task
from train import checkpoint
from train.checkpoint import Checkpoints, load_params, restore_newest
from train.errors import UserError
from train.sharding import make_mesh
from train.step import make_training

BEST = ("eval/accuracy", "max")
SCORES = {1: 0.2, 2: 0.9, 3: 0.5, 4: None, 5: 0.6, 6: None}


@pytest.fixture(scope="module")
def training():
    config = tiny_config()
    mesh = make_mesh(config, jax.devices()[:1])
    return make_training(config, tiny_model(config), tiny_task(config), mesh)


@pytest.fixture(scope="module")
def initial(training):
    return training.init()


def at_step(state, step):
    """The state with parameters that tell which step they are of."""
    params = jax.tree.map(lambda x: jnp.full_like(x, step), state.params)
    return state.replace(params=params, step=jnp.int32(step))


@pytest.fixture(scope="module")
def written(tmp_path_factory, initial):
    """A run that kept its two newest and its best checkpoint."""
    workdir = tmp_path_factory.mktemp("written")
    config = tiny_config(**{"checkpoint.keep_latest": 2, "checkpoint.keep_best": 1})
    checkpoints = Checkpoints(workdir, config, BEST)
    for step, score in SCORES.items():
        metrics = {} if score is None else {"eval/accuracy": score, "eval/loss": 1.0}
        meta = {"evaluation": metrics, "evaluated_step": step if metrics else -1, "metric": BEST}
        checkpoints.save(step, at_step(initial, step), meta, metrics)
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def newest_file(workdir, step=6):
    """The largest file of a checkpoint, which holds arrays."""
    files = (workdir / "checkpoints" / str(step)).rglob("*")
    return max(
        (f for f in files if f.is_file()),
        key=lambda f: f.stat().st_size if f.name != "files.json" else 0,
    )


def test_the_newest_and_the_best_are_kept(written):
    assert checkpoint.steps(written) == [2, 5, 6]


def test_what_was_saved_comes_back(written, training, initial):
    restored = restore_newest(written, training.abstract)
    assert restored.step == 6
    chex.assert_trees_all_equal(restored.tree, at_step(initial, 6))
    assert restored.meta["evaluated_step"] == -1


def test_a_state_may_be_donated_while_it_is_written(training, tmp_path):
    """Given a save that has returned but is still writing, when the arrays are overwritten, the old ones are on disk."""
    checkpoints = Checkpoints(tmp_path, tiny_config(), BEST)
    state, _ = training.call(training.init(), {}, np.int32(3), np.True_, program=4)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(3, state, {}, {})
    for _ in range(5):
        state, _ = training.call(state, {}, np.int32(3), np.False_, program=4)
    checkpoints.close()
    chex.assert_trees_all_equal(restore_newest(tmp_path, training.abstract).tree, expected)


def test_parameters_for_evaluation(written, initial):
    for which, step in (("best", 2), ("latest", 6), (5, 5)):
        loaded = load_params(written, which)
        assert loaded.step == step
        chex.assert_trees_all_equal(loaded.tree, at_step(initial, step).params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), initial.params)
    assert load_params(written, abstract_params=shapes).step == 2


def test_no_such_checkpoint(written, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in .*; train one with"):
        load_params(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of step 4 in .*; there are \[2, 5, 6\]"):
        load_params(written, 4)
    with pytest.raises(UserError, match="'newest' is neither"):
        load_params(written, "newest")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "says"),
    [(truncate, "bytes instead of"), (flip, "other contents"), (os.remove, "is missing")],
)
def test_a_damaged_newest_falls_back_to_the_one_before(workdir, training, capfd, damage, says):
    damage(newest_file(workdir))
    assert load_params(workdir, "latest").step == 5
    assert checkpoint.steps(workdir) == [2, 5, 6], "reading changes nothing"
    restored = restore_newest(workdir, training.abstract)
    assert restored.step == 5
    assert checkpoint.steps(workdir) == [2, 5]
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("checkpoint 6 is damaged (")
    assert first.endswith("; using 5")
    assert says in second
    assert second.endswith("; going on from 5")
    assert (workdir / "checkpoints" / "damaged-6").is_dir()


def test_a_damaged_one_without_its_list_of_files_is_noticed_by_the_reader(workdir, training, capfd):
    (workdir / "checkpoints" / "6" / "files.json").unlink()
    (workdir / "checkpoints" / "6" / "state" / "_METADATA").write_text('{"tree_meta')
    assert restore_newest(workdir, training.abstract).step == 5
    (line,) = capfd.readouterr().err.splitlines()
    assert "checkpoint 6 is damaged" in line


def test_the_step_of_a_damaged_one_can_be_saved_again(workdir, training, initial, capfd):
    truncate(newest_file(workdir))
    restore_newest(workdir, training.abstract)
    checkpoints = Checkpoints(workdir, tiny_config(), BEST)
    checkpoints.save(6, at_step(initial, 7), {}, {})
    checkpoints.close()
    restored = restore_newest(workdir, training.abstract)
    chex.assert_trees_all_equal(restored.tree.params, at_step(initial, 7).params)


def test_all_damaged_is_an_error_and_touches_nothing(workdir, training):
    for step in checkpoint.steps(workdir):
        truncate(newest_file(workdir, step))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(newest: 6"):
        restore_newest(workdir, training.abstract)
    with pytest.raises(UserError, match="is whole"):
        load_params(workdir)
    assert checkpoint.steps(workdir) == [2, 5, 6]


def test_what_a_killed_process_left_is_removed(workdir):
    unfinished = workdir / "checkpoints" / "7.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "6", unfinished)
    assert checkpoint.steps(workdir) == [2, 5, 6]
    Checkpoints(workdir, tiny_config(), BEST).close()
    assert not unfinished.exists()


def renamed(params):
    return {("proj" if name == "in_proj" else name): leaf for name, leaf in params.items()}


def wider(params):
    return params | {"embed": {"embedding": jax.ShapeDtypeStruct((16, 9), jnp.float32)}}


def without_norm(params):
    return {name: leaf for name, leaf in params.items() if name != "norm"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed, r"it has params/in_proj/bias \(16,\), which this model does not"),
        (wider, r"params/embed/embedding is \(16, 8\) in it, and \(16, 9\) in this model"),
        (without_norm, r"it has params/norm/bias \(8,\), which this model does not"),
        (
            lambda p: p | {"extra": {"kernel": p["in_proj"]["kernel"]}},
            r"it lacks params/extra/kernel \(8, 16\)",
        ),
    ],
)
def test_another_architecture_names_the_first_parameter_that_differs(
    written, training, change, says
):
    abstract = training.abstract
    params = change(abstract.params)
    with pytest.raises(UserError, match=f"another architecture: {says}"):
        restore_newest(written, abstract.replace(params=params))
    with pytest.raises(UserError, match=f"another architecture: {says}"):
        load_params(written, abstract_params=params)


def test_another_optimiser_is_named_too(written, training):
    with pytest.raises(
        UserError, match=r"it has opt_state/0/count \(\), which this model does not"
    ):
        restore_newest(written, training.abstract.replace(opt_state=()))


def test_no_space(tmp_path):
    """A limit on file sizes (EFBIG, from TensorStore's threads) stands for a full disk: the same path leads to the line."""
    command = (
        "import resource, sys; from tests.train import tiny; "
        "code = tiny.main(sys.argv[1], 'steps=10'); assert code == 0; "
        "import pathlib; run = pathlib.Path(sys.argv[1]); (run / 'summary.json').unlink(); "
        "import shutil; shutil.rmtree(run / 'checkpoints' / '10'); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY)); "
        "sys.exit(tiny.main(sys.argv[1], 'steps=10'))"
    )
    env = os.environ | {"PYTHONPATH": python_path()}
    overrides = ["checkpoint.every_steps=5"]
    command = command.replace("'steps=10'", "'steps=10', " + repr(overrides[0]))
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path / "run")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no space to write ")
    assert "(EFBIG); earlier checkpoints are intact" in line
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["5"]
    assert load_params(tmp_path / "run", "latest").step == 5
