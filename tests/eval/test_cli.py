"""The evaluation command line: tasks are found, help works, errors are one line."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from eval.__main__ import main, tasks
from train import cli

ROOT = pathlib.Path(__file__).parents[2]


def refused(capsys, *args):
    """The one line that a bad command line ends with."""
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.out + captured.err
    return captured.err


def test_a_task_is_a_file():
    assert {"mqar", "plot", "bench"} <= set(tasks())


@pytest.mark.parametrize(
    "args", [["--help"], *([task, "--help"] for task in ("mqar", "plot", "bench"))]
)
def test_help(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m eval")
    if len(args) == 1:
        for task in tasks():
            assert re.search(rf"^    {task}\s", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "a task is missing: "),
        (["--checkpoint", "runs/a"], "name the task before its options: "),
        (["mqra"], "no task 'mqra'; did you mean mqar?"),
        (["zzzzzz"], "no task 'zzzzzz'; tasks: "),
        (["__main__"], "no task '__main__'"),
        (["plot"], "the following arguments are required: workdir; see python -m eval plot --help"),
        (["plot", "a", "--ot", "b"], "unrecognized arguments: --ot b"),
        (
            ["mqar", "--checkpoint", "a", "--num_examples", "x"],
            "--num_examples: invalid int value: 'x'",
        ),
    ],
)
def test_impossible_command_lines(capsys, args, message):
    assert message in refused(capsys, *args)


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert main(["plot", str(tmp_path / "nowhere"), "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: no directory")


def test_the_rules_are_those_of_training():
    assert sys.modules["eval.__main__"].report_errors is cli.report_errors


def test_a_real_process(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "eval", "plot", "nowhere"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "error: no directory nowhere; give the --workdir of a run or a suite\n"
