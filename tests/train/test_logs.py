"""What a run says: metrics.jsonl bit for bit, TensorBoard, wandb where there is one, lines or a bar."""

import io
import json
import math
import re
import sys
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import logs
from train.config import base_config
from train.errors import UserError
from train.logs import RunLogger, metrics_line, read_metrics


def quiet_config(**log):
    config = base_config()
    config.log.tensorboard = False
    config.log.progress = False
    for key, value in log.items():
        config.log[key] = value
    return config


@given(st.integers(0, 2**40), st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_floats_read_back_bit_for_bit(step, value):
    line = metrics_line(step, {"train/loss": value})
    assert line.endswith("\n")
    record = json.loads(line)
    assert record == {"step": step, "train/loss": value}
    assert math.copysign(1, record["train/loss"]) == math.copysign(1, value)


def test_what_is_not_finite_is_null_and_the_line_stays_json():
    line = metrics_line(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": 1.0,
    }


def test_lines_are_on_disk_at_once_and_do_not_depend_on_the_clock(tmp_path):
    logger = RunLogger(tmp_path, quiet_config(), total_steps=10)
    logger.log(5, {"train/loss": np.float32(0.1), "eval/accuracy": np.array(0.5)})
    written = (tmp_path / "metrics.jsonl").read_text()
    logger.close()
    value = float(np.float32(0.1))
    assert written == f'{{"step": 5, "train/loss": {value!r}, "eval/accuracy": 0.5}}\n'
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_a_resumed_run_appends(tmp_path):
    for step in (5, 10):
        logger = RunLogger(tmp_path, quiet_config(), total_steps=10, start_step=step - 5)
        logger.log(step, {"loss": step / 10})
        logger.close()
        logger.close()  # closing twice is allowed
    assert list(read_metrics(tmp_path)) == [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 1.0}]


def test_reading_passes_over_torn_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n{"step": 2, "lo\xff\n[3]\n{"a": 1}\n{"step": 4}\n{"st'
    )
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 4]
    assert list(read_metrics(tmp_path / "nowhere")) == []


def test_tensorboard_gets_every_value(tmp_path):
    logger = RunLogger(tmp_path, quiet_config(tensorboard=True), total_steps=10)
    logger.log(5, {"train/loss": 0.25})
    logger.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_tensorboard_is_imported_only_when_wanted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # importing it raises
    RunLogger(tmp_path, quiet_config(), total_steps=1).close()
    with pytest.raises(ImportError):
        RunLogger(tmp_path, quiet_config(tensorboard=True), total_steps=1)


def test_wandb_where_there_is_none_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        RunLogger(tmp_path, quiet_config(wandb=True), total_steps=1)
    assert not list(tmp_path.iterdir())


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **kwargs: calls.append(kwargs) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: name)
    for _ in range(2):
        logger = RunLogger(tmp_path, quiet_config(wandb=True), total_steps=1)
        logger.log(1, {"loss": 2.0})
        logger.close()
    first, _, end, second, *_ = calls
    assert calls[1] == (1, {"loss": 2.0})
    assert end == "finish"
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["config"]["model"]["d_model"] == 64


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    config = quiet_config(progress=True)
    logger = RunLogger(tmp_path, config, total_steps=20)
    logger.progress(3, {"train/loss": 9.0, "tokens_per_second": 1234})
    assert capsys.readouterr().out == ""
    logger.log(5, {"train/loss": 0.123456, "learning_rate": 1e-3, "eval/accuracy": 1.0})
    logger.log(20, {"train/loss": 0.1, "tokens_per_second": 2_500_000})
    logger.close()
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"step 5/20  train/loss 0\.1235  eval/accuracy 1  1\.23k tokens/s  \d+:\d\d left", first
    )
    assert last == "step 20/20  train/loss 0.1  2.5M tokens/s"


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    logger = RunLogger(tmp_path, quiet_config(progress=True), total_steps=20, start_step=4)
    logger.progress(10, {"train/loss": 0.5, "tokens_per_second": 1500})
    logger.log(20, {"eval/loss": 0.7, "train/accuracy": 0.25, "eval/accuracy": 0.75})
    logger.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "20/20" in text
    assert "  ".join(["loss 0.5", "eval accuracy 0.75", "1.5k tokens/s"]) in text


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert logs._clock(seconds) == text
