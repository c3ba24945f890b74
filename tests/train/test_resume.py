"""Runs that were stopped or killed end with the bits of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time

import chex
import pytest

from tests.train.test_sharding import ROOT, python_path
from tests.train.tiny import tiny_config, train_tiny
from train import checkpoint
from train.logs import RunLogger

RHYTHM = {"steps": 30, "log.every_steps": 4, "eval.every_steps": 10, "model.embed_dropout": 0.1}


class Stopper(RunLogger):
    """A logger that sends its own process one SIGTERM when a call that ended at `at` or later was read."""

    at, sent = 0, False

    def progress(self, step, metrics=None):
        super().progress(step, metrics)
        if step >= self.at and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    train_tiny(tiny_config(**RHYTHM), workdir)
    return workdir


def assert_same_end(workdir, other):
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    runs = [checkpoint.load_params(path, "latest") for path in (workdir, other)]
    assert runs[0].step == runs[1].step
    chex.assert_trees_all_equal(runs[0].tree, runs[1].tree)
    for name in ("evaluation", "train_metrics", "best", "tokens", "skipped"):
        assert runs[0].meta[name] == runs[1].meta[name], name


def test_sigterm_anywhere_changes_no_bit(left_alone, tmp_path, monkeypatch, capsys):
    """Stopped in the middle of log windows, at an evaluation and in both programs, each time with other steps per call."""
    for at, steps_per_call in ((2, 3), (9, 2), (10, 8), (17, 5)):
        monkeypatch.setattr(Stopper, "at", at)
        config = tiny_config(**RHYTHM, steps_per_call=steps_per_call)
        with pytest.raises(SystemExit) as stopped:
            train_tiny(config, tmp_path, logger_factory=Stopper)
        assert stopped.value.code == 143
        step = checkpoint.steps(tmp_path)[-1]
        assert step >= at
        expected = f"SIGTERM: stopped at step {step}; the same command goes on\n"
        assert capsys.readouterr().err == expected
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    summary = train_tiny(tiny_config(**RHYTHM), tmp_path)
    assert f"{tmp_path}: going on from step {step} of 30" in capsys.readouterr().out
    assert summary["steps"] == 30
    assert_same_end(left_alone, tmp_path)


# --- real processes --------------------------------------------------------------------------------------------------

SEGMENT = "({'length': 16, 'num_kv_pairs': 2, 'num_examples': 1000},)"
CONFIG = {
    "steps": 240,
    "batch_size": 16,
    "model.vocab_size": 64,
    "model.d_model": 16,
    "model.num_layers": 1,
    "model.mixers": "[{'name': 'based', 'feature_dim': 4}]",
    "data.train": SEGMENT,
    "data.test": SEGMENT,
    "data.test_batch_size": 100,
    "optimizer.warmup_steps": 0,
    "log.every_steps": 7,
    "log.tensorboard": "false",
    "eval.every_steps": 40,
    "eval.stop_metric": "",
    # writing a checkpoint every 10 steps makes it a run of some seconds, most of them after the first checkpoint
    "checkpoint.every_seconds": 0.2,
    "checkpoint.every_steps": 10,
}


# text from the standard library, so small that a run passes over it several times; rows of a few documents each
TEXT_CONFIG = {
    **{key: value for key, value in CONFIG.items() if not key.startswith("data.")},
    "model.vocab_size": 257,
    "model.mixers": "[{'name': 'base_conv'}]",
    "data.length": 64,
    "data.test_batch_size": 64,
    "data.held_out": 0.01,
}


def start(workdir, cache, name="mqar/based", keys=CONFIG, **overrides) -> subprocess.Popen:
    """The command of a user, and a cache of compiled programs that the processes share, as a user's do."""
    env = {**os.environ, "PYTHONPATH": python_path()}
    env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    options = [f"--config.{key}={value}" for key, value in {**keys, **overrides}.items()]
    command = [sys.executable, "-m", "train", f"--config={name}", f"--workdir={workdir}", *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def interrupt(process, workdir, number, seed) -> tuple[int, str]:
    """Sends the signal at a random moment after the run has a checkpoint newer than those it started from."""
    before = max(checkpoint.steps(workdir), default=0)
    deadline = time.monotonic() + 200
    while max(checkpoint.steps(workdir), default=0) <= before and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.7))
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    return process.returncode, err


def test_killed_processes_end_with_the_same_bits(tmp_path):
    """Given one run left alone and one stopped by SIGTERM, then by SIGKILL, when the second ends, nothing differs."""
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when the test fails
    cache = tmp_path / "cache"
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    finish(start(alone, cache))

    code, err = interrupt(start(broken, cache), broken, signal.SIGTERM, seed)
    assert code == 143, err
    assert "SIGTERM: stopped at step " in err
    code, err = interrupt(start(broken, cache), broken, signal.SIGKILL, seed + 1)
    assert code == -signal.SIGKILL, err

    out = finish(start(broken, cache, **{"steps_per_call": 3, "checkpoint.every_steps": 100}))
    assert f"{broken}: going on from step " in out
    assert_same_end(alone, broken)


def test_a_killed_text_run_ends_with_the_same_bits(tmp_path):
    """The place of the data iterator, in the middle of a pass over the text, comes back with the parameters."""
    seed = time.time_ns()
    print(f"seed {seed}")
    cache = tmp_path / "cache"
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    finish(start(alone, cache, "text/small", TEXT_CONFIG))
    code, err = interrupt(
        start(broken, cache, "text/small", TEXT_CONFIG), broken, signal.SIGKILL, seed
    )
    assert code == -signal.SIGKILL, err
    finish(start(broken, cache, "text/small", TEXT_CONFIG, **{"steps_per_call": 3}))
    assert_same_end(alone, broken)
    assert (alone / "sample.txt").read_text() == (broken / "sample.txt").read_text()
