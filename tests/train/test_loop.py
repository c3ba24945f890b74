"""One run from its first step to its summary, and every way it can be told not to begin or to stop."""

import json
import os
import tempfile
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.train.tiny import tiny_config, tiny_model, tiny_task, train_tiny
from train import checkpoint, loop, run_directory
from train.errors import UserError
from train.logs import RunLogger


class Recorder(RunLogger):
    """The real logger, which also remembers what the bar was told."""

    def progress(self, step, metrics=None):
        self.seen = [*getattr(self, "seen", []), (step, metrics)]
        super().progress(step, metrics)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory, summary, loggers) of a whole run of 24 steps: log every 5, evaluate every 10."""
    workdir = tmp_path_factory.mktemp("loop") / "deep" / "run"
    loggers = []

    def factory(*args, **kwargs):
        loggers.append(Recorder(*args, **kwargs))
        return loggers[-1]

    summary = train_tiny(tiny_config(), workdir, logger_factory=factory)
    return workdir, summary, loggers


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics(finished):
    workdir, _, _ = finished
    lines = lines_of(workdir)
    assert [line["step"] for line in lines if "train/loss" in line] == [5, 10, 15, 20, 24]
    assert [line["step"] for line in lines if "eval/loss" in line] == [10, 20, 24]
    train, evaluated = lines[1], lines[2]
    assert set(train) == {
        "step",
        "train/loss",
        "train/accuracy",
        "grad_norm",
        "learning_rate",
        "skipped",
    }
    assert set(evaluated) == {"step", "eval/loss", "eval/accuracy"}
    assert lines[-1]["eval/loss"] < evaluated["eval/loss"]


def test_summary(finished):
    workdir, summary, _ = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    lines = lines_of(workdir)
    assert summary["metrics"]["eval/loss"] == lines[-1]["eval/loss"]
    assert summary["metrics"]["train/loss"] == lines[-2]["train/loss"]
    assert (summary["steps"], summary["skipped"], summary["stopped_early"]) == (24, 0, False)
    assert summary["parameters"] == 16 * 8 + 8 * 16 + 16 + 16 * 8 + 8 + 2 * 8
    assert summary["state_bytes"] == 4 * 8
    assert summary["tokens"] == 16 * (12 * 4 + 12 * 6)  # two programs, six steps at a time
    assert 0 < summary["training_seconds"] < summary["wall_seconds"]
    assert summary["tokens_per_second"] > 0
    assert summary["versions"]["jax"] == jax.__version__
    best = max(
        (line for line in lines if "eval/accuracy" in line), key=lambda line: line["eval/accuracy"]
    )
    assert summary["best"] == {"step": best["step"], "eval/accuracy": best["eval/accuracy"]}


def test_config_is_kept(finished):
    workdir, _, _ = finished
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["steps"] == 24
    assert saved["optimizer"]["name"] == "adamw"
    restored = checkpoint.load_params(workdir)
    assert restored.meta["config"] == saved


def test_the_bar_is_told_of_every_call_with_its_speed(finished):
    _, _, (logger,) = finished
    steps = [step for step, _ in logger.seen]
    assert steps == sorted(steps)
    assert steps[-1] == 24
    assert all(metrics["tokens_per_second"] > 0 for _, metrics in logger.seen)


def test_a_finished_run_says_so_and_does_nothing(finished, capsys):
    workdir, summary, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert train_tiny(tiny_config(), workdir) == summary
    assert capsys.readouterr().out == f"{workdir} is finished (24 steps); nothing to do\n"
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("learning_rate", 0.5, "config.learning_rate: 0.01 -> 0.5"),
        ("seed", 3, "config.seed: 0 -> 3"),
        ("model.d_model", 32, "config.model.d_model: 64 -> 32"),
        ("optimizer.b1", 0.8, "config.optimizer.b1: 0.9 -> 0.8"),
        ("data.power_a", 0.5, "config.data.power_a: 0.01 -> 0.5"),
    ],
)
def test_a_directory_of_another_config(finished, key, value, says):
    workdir, _, _ = finished
    with pytest.raises(UserError, match=f"holds a run of another config: {says}; take another"):
        train_tiny(tiny_config(**{key: value}), workdir)


@pytest.mark.parametrize(
    "key", ["mesh.data", "log.every_steps", "checkpoint.keep_latest", "eval.every_steps"]
)
def test_keys_that_may_change(finished, key):
    workdir, summary, _ = finished
    assert train_tiny(tiny_config(**{key: 1}), workdir) == summary


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"--workdir .*/file/run cannot be written: Not a directory"
    ):
        train_tiny(tiny_config(), tmp_path / "file" / "run")


def test_a_directory_that_cannot_be_written():
    """As another user where we are root, whom permissions do not bind."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as workdir:
        os.chmod(workdir, 0o555)
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(
                UserError, match=r"--workdir .* cannot be written: Permission denied"
            ):
                run_directory.open_directory(tiny_config(), Path(workdir))
        finally:
            os.seteuid(user)


def test_a_config_that_cannot_run_leaves_the_directory_free_for_another(tmp_path):
    with pytest.raises(UserError, match="does not fit"):
        train_tiny(tiny_config(**{"mesh.data": 3}), tmp_path)
    with pytest.raises(UserError, match="is not one of"):
        train_tiny(tiny_config(**{"optimizer.name": "adam"}), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_config_file_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        train_tiny(tiny_config(), tmp_path)


def test_stops_at_the_goal(tmp_path):
    goal = {"eval.stop_metric": "eval/loss", "eval.stop_value": 2.5, "checkpoint.enabled": False}
    summary = train_tiny(tiny_config(**goal), tmp_path)
    assert summary["stopped_early"]
    assert summary["steps"] in (10, 20)
    assert summary["metrics"]["eval/loss"] <= 2.5
    assert not (tmp_path / "checkpoints").exists()


def test_a_goal_that_is_no_metric(tmp_path):
    with pytest.raises(
        UserError, match="stop_metric='accuracy' is not one of eval/accuracy, eval/loss"
    ):
        train_tiny(tiny_config(**{"eval.stop_metric": "accuracy"}), tmp_path)


def test_bad_steps_are_skipped_and_past_the_limit_end_the_run(tmp_path, capsys):
    """Steps 3 and 11 to 20 are bad and three in a row are tolerated: the run ends after step 14 with a checkpoint."""
    config = tiny_config()
    config.data.bad_steps = (3, *range(11, 21))
    says = r"gradients of 4 steps in a row were not finite .*stopped at step 15 .* in a checkpoint"
    with pytest.raises(UserError, match=says):
        train_tiny(config, tmp_path)
    assert checkpoint.steps(tmp_path)[-1] == 15
    assert lines_of(tmp_path)[0]["skipped"] == 1
    with pytest.raises(UserError, match=says):  # nothing has changed
        train_tiny(config, tmp_path)
    config.max_bad_steps = 10
    assert train_tiny(config, tmp_path)["skipped"] == 11
    assert lines_of(tmp_path)[-1]["eval/loss"] > 0


def test_calls_are_queued_but_not_too_many(tmp_path, monkeypatch):
    """Never more than three unread reports, and mostly not fewer than one: the host does not wait for each call."""
    waiting = []
    queue = loop.Session.queue

    def spy(self, *args):
        queue(self, *args)
        waiting.append(len(self._queued))

    monkeypatch.setattr(loop.Session, "queue", spy)
    rare = {"log.every_steps": 24, "eval.every_steps": 24, "steps_per_call": 1}
    train_tiny(tiny_config(**rare, **{"checkpoint.enabled": False}), tmp_path)
    assert max(waiting) == 2
    assert sum(count == 2 for count in waiting) > 18


def test_lines_past_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 1, "a": 0.1}\n{"step": 2}\n'
    path.write_bytes(kept + b'{"step": 3, "a": 1}\n{"step": 2, "b"')
    run_directory.keep_lines(path, 2)
    assert path.read_bytes() == kept
    run_directory.keep_lines(path, 0)
    assert path.read_bytes() == b""
    run_directory.keep_lines(tmp_path / "none.jsonl", 0)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_where_compiled_programs_are_kept(tmp_path, monkeypatch):
    """The config's directory; else what JAX is set to; else the user's cache; "off" leaves JAX alone."""
    config, before = tiny_config(), jax.config.jax_compilation_cache_dir
    seen = []
    try:
        for wanted, jaxs in (
            ("off", None),
            ("", "/set/by/user"),
            ("", None),
            (f"{tmp_path}/own", None),
        ):
            config.compilation_cache = wanted
            jax.config.update("jax_compilation_cache_dir", jaxs)
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
            loop.use_compilation_cache(config)
            seen.append(jax.config.jax_compilation_cache_dir)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    kept = [f"{tmp_path}/home/jaxmodels/compiled", f"{tmp_path}/own"]
    assert seen == [None, "/set/by/user", *kept]
    assert all(Path(path).is_dir() for path in kept)


def test_impossible_models_are_one_line():
    config = tiny_config(**{"model.mixers": [{"name": "atention"}]})
    with pytest.raises(UserError, match=r"config\.model: unknown mixer 'atention'"):
        loop.build_model(config)


def test_tiny_is_what_the_loop_expects():
    config = tiny_config()
    assert tiny_task(config).sample_tokens[1] == 6
    assert tiny_model(config).d_model == 8
