"""A sweep from its first step to its results: directories, early stop, failure, signals, a kill, and the same command again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import chex
import numpy as np
import pytest

from eval.__main__ import main as evaluate
from tests.train.test_cli import TINY
from tests.train.test_resume import assert_same_end
from tests.train.test_sharding import ROOT, python_path
from tests.train.tiny import tiny_config, tiny_model, tiny_task, train_tiny
from train import checkpoint, loop
from train.cli import main
from train.logs import read_metrics
from train.suite import run_suite
from train.sweep import expand_jobs

GRID = ({"learning_rate": [0.01], "seed": [0, 1]}, {"learning_rate": [1e30], "seed": [0]})
GOOD, BAD = ["lr=0.01,seed=0", "lr=0.01,seed=1"], "lr=1e+30,seed=0"
KEYS = {"model.embed_dropout": 0.1, "steps": 30, "eval.every_steps": 12}


def sweep_config(*axes, **keys):
    config = tiny_config(**{**KEYS, **keys})
    config.sweep = axes or GRID
    return config


def run_tiny(config, workdir):
    """`run_suite` with the tiny model and task in the place of the real ones."""
    with mock.patch.multiple(
        loop,
        build_model=tiny_model,
        build_task=tiny_task,
        state_bytes=lambda model, length: 4 * model.d_model,
        legacy_state_bytes=lambda model, length: 0,
    ):
        return run_suite(config, workdir)


def ledger_of(workdir):
    return json.loads((workdir / "ledger.json").read_text())["points"]


def statuses(workdir):
    return {name: entry["status"] for name, entry in ledger_of(workdir).items()}


def same_points(workdir, other, names):
    for name in names:
        assert_same_end(workdir / name, other / name)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("swept")
    assert run_tiny(sweep_config(), workdir) == 1  # one of its points blows up
    return workdir


def test_a_point_is_the_finished_run_of_its_own_config(swept, tmp_path):
    """config.json of a point, trained alone, gives its log to 2e-6 (float32; measured: the last bit or two)."""
    name = GOOD[1]
    (point,) = [p for p in expand_jobs(sweep_config())[0].points if p.name == name]
    summary = train_tiny(point.config, tmp_path / name)
    ours, alone = (list(read_metrics(folder / name)) for folder in (swept, tmp_path))
    assert [sorted(line) for line in ours] == [sorted(line) for line in alone]
    for line, expected in zip(ours, alone):
        for key in line:
            np.testing.assert_allclose(line[key], expected[key], rtol=2e-6, err_msg=key)
    configs = [(folder / name / "config.json").read_text() for folder in (swept, tmp_path)]
    assert configs[0] == configs[1]
    found = json.loads((swept / name / "summary.json").read_text())
    assert sorted(found) == sorted(summary)
    for key in ("steps", "parameters", "state_bytes", "tokens", "skipped", "stopped_early"):
        assert found[key] == summary[key], key
    assert found["best"]["step"] == summary["best"]["step"]
    for which in ("best", "latest"):
        mine, its = (checkpoint.load_params(folder / name, which) for folder in (swept, tmp_path))
        assert (mine.step, sorted(mine.meta)) == (its.step, sorted(its.meta))
        chex.assert_trees_all_close(mine.tree, its.tree, rtol=1e-4, atol=1e-6)


def test_a_point_that_fails_has_its_reason_and_the_others_go_on(swept):
    assert statuses(swept) == {**dict.fromkeys(GOOD, "finished"), BAD: "failed"}
    entry = ledger_of(swept)[BAD]
    assert "gradients of 4 steps in a row were not finite" in entry["reason"]
    assert entry["steps"] == checkpoint.steps(swept / BAD)[-1] < 10
    assert not (swept / BAD / "summary.json").exists()
    runs = json.loads((swept / "summary.json").read_text())["runs"]
    assert runs[BAD] == {"reason": entry["reason"]}
    assert not (swept / ".grid").exists()
    assert (swept / "results.csv").read_text().count("\n") == 4
    assert (swept / "best.csv").read_text().splitlines()[1].startswith(f"{swept.name},0.01,")


def test_the_same_command_trains_nothing_that_is_finished(swept, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(swept, again)
    before = {path: path.stat().st_mtime_ns for name in GOOD for path in (again / name).rglob("*")}
    (again / "results.csv").unlink()
    with mock.patch("train.sweep_loop.train_grid", side_effect=AssertionError("trained")):
        assert run_tiny(sweep_config(), again) == 1
        # a point that failed goes on from its own checkpoint, as a run does, and fails again
        assert f"{again / BAD}: going on from step " in capsys.readouterr().out
        # a point that was added trains alone
        assert run_tiny(sweep_config({"learning_rate": [0.01], "seed": [0, 1, 2]}), again) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert statuses(again) == dict.fromkeys([*GOOD, "lr=0.01,seed=2"], "finished")
    assert (again / "results.csv").read_text().count("finished") == 3


def test_points_of_another_config_are_refused_and_kept(swept, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(swept, other)
    changed = sweep_config({"learning_rate": [0.01], "seed": [0, 1]}, **{"optimizer.b1": 0.8})
    assert run_tiny(changed, other) == 1
    for entry in ledger_of(other).values():
        assert "holds a run of another config: config.optimizer.b1" in entry["reason"]
    assert all((other / name / "summary.json").exists() for name in GOOD)


def test_every_point_stops_at_its_own_goal(tmp_path):
    goal = {"eval.stop_metric": "eval/loss", "eval.stop_value": 2.3, "checkpoint.enabled": False}
    axes = {"learning_rate": [0.001, 0.05], "seed": [0]}
    assert run_tiny(sweep_config(axes, **goal), tmp_path) == 0
    slow, fast = (
        json.loads((tmp_path / f"lr={rate},seed=0" / "summary.json").read_text())
        for rate in (0.001, 0.05)
    )
    assert (slow["steps"], slow["stopped_early"]) == (30, False)
    assert fast["stopped_early"]
    assert fast["metrics"]["eval/loss"] <= 2.3 < slow["metrics"]["eval/loss"]
    assert not list(tmp_path.rglob("checkpoints"))


def test_sigterm_saves_and_the_same_command_ends_with_the_same_bits(
    swept, tmp_path, monkeypatch, capsys
):
    from train.sweep_progress import GridProgress

    real, sent = GridProgress.progress, []

    def stopper(self, step, rate):
        if step >= 14 and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, step, rate)

    monkeypatch.setattr(GridProgress, "progress", stopper)
    with pytest.raises(SystemExit) as stopped:
        run_tiny(sweep_config(), tmp_path)
    assert stopped.value.code == 143
    assert "SIGTERM: stopped at step " in capsys.readouterr().err
    assert statuses(tmp_path) == {**dict.fromkeys(GOOD, "stopped"), BAD: "failed"}
    assert run_tiny(sweep_config(steps_per_call=3), tmp_path) == 1
    assert f"{tmp_path}: going on from step " in capsys.readouterr().out
    same_points(swept, tmp_path, GOOD)
    assert statuses(tmp_path) == statuses(swept)


def test_a_bug_or_a_full_memory_fails_its_job_and_the_next_one_trains(tmp_path, capsys):
    axes = {"learning_rate": [0.01, 0.02], "steps": [4, 6]}

    def model(config, real=tiny_model):
        if config.steps == 4:
            raise MemoryError("RESOURCE_EXHAUSTED: 99 GiB\nmore")
        return real(config)

    with mock.patch("tests.train.test_sweep_loop.tiny_model", model):
        assert run_tiny(sweep_config(axes), tmp_path) == 1
    assert set(statuses(tmp_path).values()) == {"failed", "finished"}
    reason = ledger_of(tmp_path)["steps=4/lr=0.01"]["reason"]
    assert reason.startswith("MemoryError: RESOURCE_EXHAUSTED: 99 GiB (traceback in ")
    assert "more" in (tmp_path / "steps=4" / "error.txt").read_text()
    assert capsys.readouterr().err.count("error: run 'steps=4/lr=0.0") == 2
    assert run_tiny(sweep_config(axes), tmp_path) == 0  # mended
    assert set(statuses(tmp_path).values()) == {"finished"}
    assert not (tmp_path / "steps=4" / "error.txt").exists()


# --- real processes --------------------------------------------------------------------------------------------------

SLOW = """
import pathlib, sys, time
from tests.train import test_sweep_loop, tiny
real = tiny.tiny_evaluate
tiny.tiny_evaluate = lambda *args: (time.sleep(0.5), real(*args))[1]
config = test_sweep_loop.sweep_config(**{"checkpoint.every_steps": 4})
test_sweep_loop.run_tiny(config, pathlib.Path(sys.argv[1]))
"""


def test_a_killed_sweep_ends_with_the_same_bits(swept, tmp_path, capsys):
    """Given one sweep left alone and one killed after a checkpoint, when that is run again, nothing differs."""
    env = {**os.environ, "PYTHONPATH": python_path()}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while not checkpoint.steps(tmp_path / ".grid") and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert set(statuses(tmp_path).values()) <= {"running", "failed"}
    assert run_tiny(sweep_config(), tmp_path) == 1
    assert f"{tmp_path}: going on from step " in capsys.readouterr().out
    same_points(swept, tmp_path, GOOD)
    assert not (tmp_path / ".grid").exists()


def test_the_command_line_and_an_evaluation_of_a_point(tmp_path, capsys):
    """On MQAR: a product of runs and rates; each point's directory is one that `python -m eval` takes."""
    sweep = "({'learning_rate': [0.001, 0.01], 'model.d_model': [8]},)"
    arguments = [
        *TINY,
        "--config.model.num_layers=1",
        "--config.model.mixers=[{'name':'attention'}]",
    ]
    command = ["--config=mqar/attention", f"--workdir={tmp_path}", f"--config.sweep={sweep}"]
    assert main([*command, *arguments]) == 0
    out = capsys.readouterr().out
    assert "[1/1] d_model=8  2 points in one program" in out
    assert "step 4/4  2 points  " in out
    point = tmp_path / "d_model=8" / "lr=0.01"
    assert evaluate(["mqar", "--checkpoint", str(point)]) == 0
    accuracy = json.loads((point / "summary.json").read_text())["metrics"]["eval/accuracy"]
    assert f"{accuracy:.4f}" in capsys.readouterr().out


def test_an_axis_that_is_no_key_is_one_line_and_leaves_nothing(tmp_path, capsys):
    sweep = "--config.sweep=({'model.d_modl': [8]},)"
    assert main(["--config=mqar/attention", f"--workdir={tmp_path / 'w'}", sweep]) == 2
    says = "config.sweep[0]: no config key config.model.d_modl; did you mean config.model.d_model?"
    assert capsys.readouterr().err == f"error: {says}\n"
    assert not (tmp_path / "w").exists()
