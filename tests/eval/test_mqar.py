"""python -m eval mqar: the numbers of a run again, other segments, and directories that hold nothing to evaluate."""

import json
import shutil

import pytest

from eval.__main__ import main
from eval.mqar import parse_segments
from train.config import base_config
from train.errors import UserError
from train.loop import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: two attention layers of width 8 on 16 tokens, three steps."""
    config = base_config()
    config.steps = 3
    config.batch_size = 8
    config.model.update({"vocab_size": 64, "d_model": 8, "max_positions": 32})
    config.data.train = ({"length": 16, "num_kv_pairs": 2, "num_examples": 64},)
    config.data.test = ({"length": 16, "num_kv_pairs": 2, "num_examples": 24},)
    config.data.test_batch_size = 16
    config.log.update({"tensorboard": False, "progress": False})
    workdir = tmp_path_factory.mktemp("mqar") / "run"
    return workdir, run(config, workdir)


def command(capsys, *args):
    """Exit code, output and errors of one evaluation."""
    code = main(["mqar", *(str(arg) for arg in args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *args):
    """The one line that it ends with."""
    code, out, err = command(capsys, *args)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in out + err
    return err


def test_the_run_gives_its_own_numbers_again(trained, capsys, tmp_path):
    workdir, summary = trained
    code, out, err = command(capsys, "--checkpoint", workdir, "--json", tmp_path / "new" / "a.json")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "new" / "a.json").read_text())
    assert result["step"] == 3
    assert result["accuracy"] == summary["metrics"]["eval/accuracy"]
    assert result["loss"] == summary["metrics"]["eval/loss"]
    (segment,) = result["segments"]
    assert segment["num_examples"] == 24
    assert f"{segment['loss']:.4f}" in out
    assert f"{workdir}, step 3" in out


def test_other_segments(trained, capsys, tmp_path):
    workdir, _ = trained
    args = ["--segments", "16:2, 32:4", "--num_examples", "8", "--step", "latest"]
    code, out, err = command(capsys, "--checkpoint", workdir, *args, "--json", tmp_path / "a.json")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "a.json").read_text())
    sizes = [(s["length"], s["num_kv_pairs"], s["num_examples"]) for s in result["segments"]]
    assert sizes == [(16, 2, 8), (32, 4, 8)]
    assert "all" in out
    mean = sum(s["loss"] for s in result["segments"]) / 2
    assert result["loss"] == pytest.approx(mean, rel=1e-6)  # both have as many examples


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--segments", "64x4"], "--segments must be LENGTH:PAIRS,... like 64:4,128:8, got '64x4'"),
        (["--segments", "64:4,"], "got ''"),
        (["--segments", "63:4"], "--segments: length 63 is odd"),
        (["--segments", "16:5"], "--segments: 4*kv > length"),
        (["--segments", "64:4"], "--segments: vocab_size 64 must be larger than length 64"),
        (["--segments", "40:4"], "40 tokens do not fit the 32 learned positions"),
        (["--num_examples", "0"], "--num_examples must be at least 1, got 0"),
        (["--step", "soon"], "--step must be best, latest or a number, got 'soon'"),
        (["--step", "77"], "no checkpoint of step 77"),
        (["--json", "{file}/a.json"], "/file"),
    ],
)
def test_what_cannot_be_evaluated(trained, capsys, tmp_path, args, message):
    (tmp_path / "file").touch()
    args = [arg.format(file=tmp_path / "file") for arg in args]
    line = refused(capsys, "--checkpoint", trained[0], *args)
    assert message in line
    assert line.count("\n") == 1


def spoil_config(run):
    (run / "config.json").write_text("{")


def forget_config(run):
    (run / "config.json").unlink()


def unknown_key(run):
    config = json.loads((run / "config.json").read_text())
    config["model"]["d_modle"] = 3
    (run / "config.json").write_text(json.dumps(config))


def other_task(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "task": "pile"}))


def other_width(run):
    config = json.loads((run / "config.json").read_text())
    config["model"]["d_model"] = 16
    (run / "config.json").write_text(json.dumps(config))


def no_checkpoint(run):
    shutil.rmtree(run / "checkpoints")


def corrupt_checkpoints(run):
    for file in run.glob("checkpoints/*/state/**/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "config.json is not readable JSON"),
        (forget_config, "holds no config.json; give the --workdir of a training run"),
        (
            unknown_key,
            "config.json: no config key config.model.d_modle; did you mean config.model.d_model?",
        ),
        (other_task, "was trained on 'pile', not on mqar"),
        (other_width, "is of another architecture"),
        (no_checkpoint, "no checkpoint in"),
        (corrupt_checkpoints, "is whole"),
        (shutil.rmtree, "no directory"),
    ],
)
def test_a_run_that_is_not_whole(trained, capsys, tmp_path, spoil, message):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    spoil(run)
    assert message in refused(capsys, "--checkpoint", run)


def test_the_directory_of_a_suite_names_its_runs(trained, capsys, tmp_path):
    shutil.copytree(trained[0], tmp_path / "based_16")
    line = refused(capsys, "--checkpoint", tmp_path)
    assert f"take one of its runs: {tmp_path}/based_16" in line


@pytest.mark.parametrize("text", ["", "64", "64:", ":4", "-64:4", "64:4;32:2", "64:4.0"])
def test_segments_of_another_form(text):
    with pytest.raises(UserError, match="LENGTH:PAIRS"):
        parse_segments(text)


def test_a_broken_checkpoint_falls_back_to_an_older_one(trained, capsys, tmp_path):
    """The newest is damaged: the one before it is used, and that is said."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    steps = sorted(
        int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()
    )
    newest = run / "checkpoints" / str(steps[-1])
    older = run / "checkpoints" / "1"
    if not older.exists():
        shutil.copytree(newest, older)
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    code, out, err = command(capsys, "--checkpoint", run)
    assert code == 0
    assert f"checkpoint {steps[-1]} is damaged" in err
    assert "step 1" in out
