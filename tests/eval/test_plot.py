"""python -m eval plot: the figure again, from what the runs left."""

import json

import pytest

from eval.__main__ import main
from train.config import base_config, dumps


@pytest.fixture
def suite(tmp_path):
    """Two finished runs, as a suite leaves them."""
    for name, accuracy in (("attention", 1.0), ("hyena", 0.5)):
        (tmp_path / name).mkdir()
        config = base_config()
        config.model.mixers = [{"name": name}]
        (tmp_path / name / "config.json").write_text(dumps(config))
        summary = {"metrics": {"eval/accuracy": accuracy}, "state_bytes": 4000 * (1 + accuracy)}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_the_figure_goes_where_the_suite_put_it(suite, capsys):
    assert main(["plot", str(suite)]) == 0
    path = suite / "plots" / "recall_memory.png"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_other_formats(suite):
    out = suite / "new" / "figure.svg"
    assert main(["plot", str(suite), "--out", str(out)]) == 0
    assert "<svg" in out.read_text()


@pytest.mark.parametrize(
    ("spoil", "args", "message"),
    [
        (
            lambda d: None,
            ["--out", "figure.gif"],
            "--out figure.gif must end in one of .png, .pdf, .svg",
        ),
        (
            lambda d: (d / "hyena" / "summary.json").write_text("{"),
            [],
            "hyena/summary.json is not readable JSON",
        ),
        (lambda d: [p.unlink() for p in d.glob("*/summary.json")], [], "holds no finished run"),
        (lambda d: (d / "file").touch(), ["--out", "{d}/file/a.png"], "/file"),
    ],
)
def test_what_cannot_be_drawn(suite, capsys, spoil, args, message):
    spoil(suite)
    assert main(["plot", str(suite), *(arg.format(d=suite) for arg in args)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
