"""Suites: every run in its directory, a failed one does not stop the others, and the comparison at the end.

The loop is replaced by one that answers at once; tests/train/test_cli.py trains a real suite.
"""

import json

import pytest

import train.loop
from train.config import base_config, dumps
from train.errors import UserError
from train.suite import run_suite


def suite_config():
    config = base_config()
    config.plot = "recall_memory"
    config.runs = (
        {"name": "att", "model.mixers": [{"name": "attention"}]},
        {"name": "b8", "model.mixers": [{"name": "based", "feature_dim": 8}]},
        {"name": "b16", "model.mixers": [{"name": "based", "feature_dim": 16}]},
    )
    return config


@pytest.fixture
def loop(monkeypatch):
    """A loop that writes what the real one writes. loop.fails maps a run to the exception it ends with."""

    class Loop:
        def __init__(self):
            self.fails, self.ran = {}, []

        def run(self, config, workdir):
            self.ran.append(workdir.name)
            if workdir.name in self.fails:
                raise self.fails[workdir.name]
            workdir.mkdir(parents=True, exist_ok=True)
            summary = {
                "metrics": {"eval/accuracy": 0.5},
                "parameters": 12345,
                "state_bytes": 4096 + len(self.ran),
                "legacy_state_bytes": 40548,
                "steps": 10,
                "wall_seconds": 3.2,
            }
            (workdir / "config.json").write_text(dumps(config))
            (workdir / "summary.json").write_text(json.dumps(summary))
            return summary

    fake = Loop()
    monkeypatch.setattr(train.loop, "run", fake.run)
    return fake


def test_a_suite_trains_compares_and_draws(tmp_path, loop, capsys):
    assert run_suite(suite_config(), tmp_path / "s") == 0
    out = capsys.readouterr().out
    assert loop.ran == ["att", "b8", "b16"]
    assert "[2/3] b8" in out
    for cell in ("BASED", "12,345", "4,097 B", "40,548 B", "0.500"):
        assert cell in out
    assert str(tmp_path / "s" / "plots" / "recall_memory.png") in out
    assert (tmp_path / "s" / "plots" / "recall_memory.png").exists()
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert list(summary["runs"]) == ["att", "b8", "b16"]


def test_a_failed_run_is_recorded_and_the_rest_go_on(tmp_path, loop, capsys):
    loop.fails = {
        "att": UserError("20 gradients in a row were not finite"),
        "b8": ZeroDivisionError("oh"),
    }
    assert run_suite(suite_config(), tmp_path) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "error: run 'att' failed: 20 gradients in a row were not finite",
        f"error: run 'b8' failed: ZeroDivisionError: oh (traceback in {tmp_path / 'b8' / 'error.txt'})",
    ]
    assert "failed: see below" in captured.out
    assert "ZeroDivisionError" in (tmp_path / "b8" / "error.txt").read_text()
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert runs["att"] == {"reason": "20 gradients in a row were not finite"}
    assert runs["b16"]["steps"] == 10

    loop.fails = {}  # mended: the same command tries again and clears the record
    assert run_suite(suite_config(), tmp_path) == 0
    assert not (tmp_path / "b8" / "error.txt").exists()


def test_everything_failed(tmp_path, loop):
    loop.fails = {name: UserError("no") for name in ("att", "b8", "b16")}
    assert run_suite(suite_config(), tmp_path) == 1
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("stop", [SystemExit(143), KeyboardInterrupt()])
def test_a_signal_stops_the_suite(tmp_path, loop, stop):
    loop.fails = {"b8": stop}
    with pytest.raises(type(stop)):
        run_suite(suite_config(), tmp_path)
    assert loop.ran == ["att", "b8"]
    assert list(json.loads((tmp_path / "summary.json").read_text())["runs"]) == ["att"]


def test_runs_that_cannot_work_are_refused_before_any_is_trained(tmp_path, loop):
    config = suite_config()
    config.mesh.fsdp = 3
    with pytest.raises(UserError, match="mesh"):
        run_suite(config, tmp_path / "s")
    assert loop.ran == []
    assert not (tmp_path / "s").exists()
