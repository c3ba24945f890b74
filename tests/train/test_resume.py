"""Real processes, stopped and killed while they train, end with the bits of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time

import chex

from tests.train.test_sharding import ROOT, python_path
from train import checkpoint

# About three seconds of training: fourteen evaluations of .2 s, checkpoints at each, by time, and every 3 steps.
RUN = (
    "steps=70",
    "eval.every_steps=5",
    "log.every_steps=2",
    "pause=0.2",
    "model.embed_dropout=0.1",
)
SAVES = ("checkpoint.every_seconds=0.1", "checkpoint.every_steps=3")


def start(workdir, cache, *overrides) -> subprocess.Popen:
    """The real compiler, and a cache of its programs that the processes share, as a user's do."""
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": python_path()}
    env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    command = [sys.executable, "tests/train/tiny.py", str(workdir), *RUN, *overrides]
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


def test_interrupted_runs_end_with_the_same_bits(tmp_path):
    """Given one run left alone and one stopped by SIGTERM, then killed, when the second ends, nothing differs."""
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when the test fails
    cache = tmp_path / "cache"
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    finish(start(alone, cache, *SAVES))

    code, err = interrupt(start(broken, cache, *SAVES), broken, signal.SIGTERM, seed)
    assert code == 143, err
    stopped = int(err.split("stopped at step ")[1].split(";")[0])
    assert err == f"SIGTERM: stopped at step {stopped}; the same command goes on\n"
    assert checkpoint.steps(broken)[-1] == stopped

    code, err = interrupt(start(broken, cache, *SAVES), broken, signal.SIGKILL, seed + 1)
    assert code == -signal.SIGKILL, err

    out = finish(start(broken, cache, "checkpoint.every_steps=0", "steps_per_call=3"))
    assert f"{broken}: going on from step " in out
    assert (broken / "metrics.jsonl").read_bytes() == (alone / "metrics.jsonl").read_bytes()
    runs = [checkpoint.load_params(workdir, "latest") for workdir in (alone, broken)]
    assert runs[0].step == runs[1].step == 50
    chex.assert_trees_all_equal(runs[0].tree, runs[1].tree)
