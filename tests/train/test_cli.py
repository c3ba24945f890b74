"""The training command line: help, options, and one line with exit code 2 for everything a user can mend.

Runs in this process, except for one real one; tiny models, so that a run takes a second.
"""

import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import train.loop
from train.cli import main, parse
from train.config import KEYS
from train.config_files import available
from train.config_paths import get_key
from train.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]

# A run of two layers of width 8 on 16 tokens: enough to train, log, save and finish.
TINY = [
    "--config.model.vocab_size=32",
    "--config.model.d_model=8",
    "--config.data.train=[{'length': 16, 'num_kv_pairs': 2, 'num_examples': 64}]",
    "--config.data.test=[{'length': 16, 'num_kv_pairs': 2, 'num_examples': 16}]",
    "--config.data.test_batch_size=16",
    "--config.batch_size=8",
    "--config.steps=4",
    "--config.optimizer.warmup_steps=0",
    "--config.log.every_steps=2",
    "--config.log.tensorboard=false",
    "--config.eval.every_steps=4",
]


def command(capsys, *args):
    """Exit code, output and errors of one command line."""
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *args):
    """The one line that a bad command line ends with."""
    code, out, err = command(capsys, *args)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


# --- help and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpfull"])
def test_help_lists_the_configs_and_every_key(capsys, flag):
    code, out, err = command(capsys, flag)
    assert (code, err) == (0, "")
    assert "usage: python -m train --config CONFIG --workdir DIR" in out
    for name in available():
        assert re.search(rf"^  {name}(\[:[\w|]+\])?$", out, re.MULTILINE)
    for path, _, meaning in KEYS:
        assert f"  {path} " in out
        assert meaning in out


def test_help_is_quick():
    """It must not wait for jax."""
    code = "import sys, train.cli; train.cli.main(['--help']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("args", "path", "value"),
    [
        (["--config.steps=7"], "steps", 7),
        (["--config.steps", "7"], "steps", 7),
        (["-config.steps=7"], "steps", 7),
        (["--config.steps=7", "--config.steps=8"], "steps", 8),
        (["--config.log.wandb"], "log.wandb", True),
        (["--noconfig.log.progress"], "log.progress", False),
        (["--config.log.progress=false"], "log.progress", False),
        (["--config.model.mixers[1].feature_dim=24"], "model.mixers[1].feature_dim", 24),
        (["--config.model.mixers[1].num_heads=2"], "model.mixers[1].num_heads", 2),
        (
            ["--config.model.mixers=[{'name': 'hyena'}]", "--config.model.mixers[0].l_max=8"],
            "model.mixers",
            [{"name": "hyena", "l_max": 8}],
        ),
        (["--config.data.train[0].num_examples=none"], "data.train[0].num_examples", None),
    ],
)
def test_overrides(args, path, value):
    options = parse(["--config", "mqar/based", "--workdir=w", *args])
    assert get_key(options.config, path) == value
    assert options.workdir == pathlib.Path("w")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--config is missing; e.g. --config mqar/attention, and --help lists the configs"),
        (["--config="], "--config is missing"),
        (
            ["--config", "mqar/based"],
            "--workdir is missing; say where the run goes, e.g. --workdir runs/based",
        ),
        (
            ["--config", "mqar/basde", "--workdir", "w"],
            "no config 'mqar/basde'; did you mean mqar/based?",
        ),
        (
            ["--config", "mqar/based", "--workdri", "w"],
            "Unknown command line flag 'workdri'. Did you mean: workdir",
        ),
        (["--config", "mqar/based", "--workdir", "w", "extra"], "unexpected 'extra'"),
        (
            ["--config", "mqar/based", "--workdir", "w", "--config.steps"],
            "Missing value for flag --config.steps",
        ),
        (
            ["--config", "mqar/based", "--workdir", "w", "--config.log.wandb=x"],
            "--config.log.wandb=x",
        ),
        (
            ["--config", "mqar/based", "--workdir", "w", "--noconfig.steps"],
            "--no works only for keys that are true or false",
        ),
        (
            ["--config", "mqar/based", "--workdir", "w", "--config.steps=x"],
            "config.steps must be an integer, got 'x'",
        ),
        (
            ["--config", "mqar/based", "--workdir", "w", "--config.model.d_modle=8"],
            "no config key config.model.d_modle; did you mean config.model.d_model?",
        ),
        (
            ["--config", "mqar/based", "--workdir", "w", "--config.model.mixers[2].name=based"],
            "index 2 is past the end, the list has 2 items",
        ),
    ],
)
def test_impossible_command_lines(capsys, args, message):
    assert message in refused(capsys, *args)


def test_debug_shows_the_traceback(capsys):
    code, _, err = command(capsys, "--config", "mqar/basde", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: no config")


# --- configs that cannot be trained -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.mixers[1].name=basde",
            "unknown mixer 'basde'; there are attention, base_conv, based, hyena",
        ),
        (
            "model.mixers[1].feature_dmi=8",
            "mixer based has no field 'feature_dmi'; did you mean 'feature_dim'?",
        ),
        (
            "model.mixers[1].feature_dim=x",
            "config.model.mixers[1].feature_dim must be an integer, got 'x'",
        ),
        (
            "model.mixers[1].num_heads=x",
            "config.model.mixers[1].num_heads must be like its default 1, got 'x'",
        ),
        ("model.mixers[1].kernel_init=x", "is a function and cannot be set in a config"),
        ("model.mixers[1].num_heads=3", "config.model: "),
        ("model.mixers=[]", "config.model"),
        ("model.mixers=[3]", "config.model.mixers must be a list of {'name': ..., field: value}"),
        ("model.norm=batchnorm", "unknown norm 'batchnorm'"),
        (
            "model.dtype=float17",
            "config.model.dtype must be one of float32, bfloat16, got 'float17'",
        ),
        ("model.d_model=0", "config.model.d_model must be at least 1, got 0"),
        ("model.embed_dropout=1", "config.model.embed_dropout must be in [0, 1), got 1"),
        ("task=mqra", "config.task must be one of mqar, text, got 'mqra'; did you mean mqar?"),
        ("steps=0", "config.steps must be at least 1, got 0"),
        ("optimizer.name=adam", "adamw"),
        ("optimizer.schedule=cosin", "cosine"),
        ("optimizer.decay_mask=none", "matrices"),
        ("optimizer.warmup_steps=99999", "warmup_steps"),
        ("optimizer.accumulate=3", "accumulate"),
        ("data.mode=cloud", "config.data.mode must be one of device, zoology, got 'cloud'"),
        ("data.seed=x", "config.data.seed must be a number from 0 on or None, got 'x'"),
        ("mesh.data=7", "mesh"),
        ("mesh.tensor=-1", "mesh"),
        ("data.train[0].num_kv_pairs=17", "4*kv > length"),
        ("data.test[0].length=63", "length 63 is odd"),
        ("model.vocab_size=64", "vocab_size 64 must be larger than length 64"),
        ("data.train[0].num_kv_pair=4", "num_kv_pairs"),
        ("data.train=[]", "config.data.train"),
    ],
)
def test_impossible_configs(capsys, tmp_path, override, message):
    workdir = tmp_path / "run"
    line = refused(capsys, "--config", "mqar/based", "--workdir", workdir, f"--config.{override}")
    assert message in line
    assert not workdir.exists()


@pytest.mark.parametrize("name", available())
def test_every_config_that_ships_can_be_trained(name):
    from train.check import check
    from train.config_files import load_config

    check(load_config(name))


# --- directories --------------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    line = refused(capsys, "--config", "mqar/based", "--workdir", tmp_path / "file" / "run", *TINY)
    assert str(tmp_path / "file" / "run") in line


def test_train_resume_finish_and_refuse_another_config(capsys, tmp_path):
    based = ["--config", "mqar/based", "--workdir", tmp_path, *TINY]
    code, out, err = command(capsys, *based)
    assert (code, err) == (0, "")
    assert "step 4/4" in out
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["d_model"] == 8
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"metrics", "parameters", "state_bytes", "steps", "wall_seconds"} <= set(summary)
    assert (tmp_path / "plots" / "learning_curves.png").exists()
    last = out.splitlines()[-1]
    assert last.startswith(f"{tmp_path}: accuracy ")
    assert f"4 steps, {summary['parameters']:,} parameters" in last
    before = {p: p.read_bytes() for p in tmp_path.glob("*.json*")}

    code, out, _ = command(capsys, *based)
    assert code == 0
    assert "finished" in out

    line = refused(capsys, *based, "--config.model.d_model=16")
    assert "config.model.d_model: 8 -> 16" in line
    assert {p: p.read_bytes() for p in tmp_path.glob("*.json*")} == before


def test_a_suite_trains_and_draws(capsys, tmp_path):
    shared = [arg for arg in TINY if not arg.startswith("--config.eval")]
    runs = [
        {"name": "a", "model.mixers": [{"name": "attention"}], "learning_rate": 0.01},
        {"name": "b", "model.mixers": [{"name": "base_conv", "kernel_size": 3}]},
    ]
    args = ["--config", "mqar/demo", "--workdir", tmp_path, *shared, f"--config.runs={runs}"]
    code, out, err = command(capsys, *args)
    assert (code, err) == (0, "")
    assert (tmp_path / "plots" / "recall_memory.png").exists()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["learning_rate"] == 0.01
    assert list(json.loads((tmp_path / "summary.json").read_text())["runs"]) == ["a", "b"]

    code, out, _ = command(capsys, *args)  # nothing is trained twice
    assert code == 0
    assert "step" not in out.replace("steps", "")


# --- what the loop raises -----------------------------------------------------------------------------------------


@pytest.fixture
def loop_raises(monkeypatch):
    def install(error):
        def run(config, workdir):
            raise error

        monkeypatch.setattr(train.loop, "run", run)

    return install


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("too many\nbad steps"), "error: too many bad steps\n"),
        (OSError(errno.ENOSPC, "x", "/a/b"), f"error: {os.strerror(errno.ENOSPC)}: /a/b\n"),
        (PermissionError(errno.EACCES, "x"), f"error: {os.strerror(errno.EACCES)}\n"),
    ],
)
def test_errors_of_a_run_are_one_line(capsys, tmp_path, loop_raises, error, line):
    loop_raises(error)
    assert refused(capsys, "--config", "mqar/based", "--workdir", tmp_path) == line


def test_ctrl_c_is_no_error(capsys, tmp_path, loop_raises):
    loop_raises(KeyboardInterrupt())
    code, _, err = command(capsys, "--config", "mqar/based", "--workdir", tmp_path)
    assert code == 130
    assert err == "\nstopped; the same command continues\n"


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError(errno.EBADF, "a bug")])
def test_bugs_keep_their_traceback(tmp_path, loop_raises, bug):
    loop_raises(bug)
    with pytest.raises(type(bug), match="a bug"):
        main(["--config", "mqar/based", "--workdir", str(tmp_path)])


def test_a_real_process(tmp_path):
    """python -m train from a directory of its own: exit code, the streams, and a polite SIGTERM."""
    args = [
        sys.executable,
        "-m",
        "train",
        "--config",
        "mqar/base_conv",
        "--workdir",
        tmp_path / "run",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    long = [arg for arg in TINY if "steps" not in arg] + ["--config.log.every_steps=1"]
    process = subprocess.Popen(
        [*args, *long, "--config.steps=1000000"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert first.startswith("step 1/1000000")
    assert process.returncode == 143
    assert err.count("\n") == 1
    assert "SIGTERM" in err
