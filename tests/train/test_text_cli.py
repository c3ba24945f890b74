"""Bad text on the command line of training: one line, exit code 2, and nothing left behind."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from train.cli import main

SMALL = (
    "--config=text/small",
    "--config.steps=2",
    "--config.optimizer.warmup_steps=0",
    "--config.batch_size=2",
    "--config.model.d_model=16",
    "--config.model.num_layers=1",
    "--config.model.mixers=[{'name': 'base_conv'}]",
    "--config.data.length=32",
    "--config.log.tensorboard=false",
)


def train(tmp_path, *options):
    return main([*SMALL, f"--workdir={tmp_path / 'run'}", *map(str, options)])


def refused(tmp_path, capsys, *options) -> str:
    """The one line that the command ends with; the directory holds no run."""
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    assert train(tmp_path, cache, *options) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert not list((tmp_path / "run").glob("*")), "something was left behind"
    return lines[0]


def path_option(path) -> str:
    return f"--config.data.path={path}"


def test_a_missing_file(tmp_path, capsys):
    line = refused(tmp_path, capsys, path_option(tmp_path / "nowhere.txt"))
    assert "nowhere.txt" in line


def test_an_empty_file(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    assert "empty" in refused(tmp_path, capsys, path_option(tmp_path / "empty.txt"))


def test_a_folder_with_nothing_readable(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").write_bytes(b"x")
    line = refused(tmp_path, capsys, path_option(tmp_path / "folder"))
    assert "no file that can be read" in line
    assert ".txt" in line


def test_bytes_that_are_not_utf8(tmp_path, capsys):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"plain words " * 300 + b"caf\xe9 " + b"more words " * 300)
    line = refused(tmp_path, capsys, path_option(path))
    assert "3603" in line  # 12 * 300 + 3
    assert "--config.data.errors=replace" in line
    assert train(tmp_path, path_option(path), "--config.data.errors=replace") == 0


def test_broken_jsonl_lines_are_counted_up_to_a_limit(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    good = ['{"text": "the quick brown fox jumps over the lazy dog"}'] * 100
    path.write_text("\n".join([*good[:50], '{"text": "cut', *good[50:], "", '{"te']))
    assert "2 " in run_and_read(tmp_path, capsys, path_option(path))
    line = refused(tmp_path / "again", capsys, path_option(path), "--config.data.max_bad_lines=1")
    assert "lines.jsonl" in line
    assert "103" in line  # the second broken line, past the limit


def run_and_read(tmp_path, capsys, *options) -> str:
    assert train(tmp_path, *options) == 0
    return capsys.readouterr().err


def test_a_truncated_parquet_file(tmp_path, capsys):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"text": ["some words"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-40])
    assert "table.parquet" in refused(tmp_path, capsys, path_option(path))


def test_a_column_that_is_not_there(tmp_path, capsys):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"content": ["some words"] * 10}), path)
    line = refused(tmp_path, capsys, path_option(path))
    assert "content" in line
    assert "text_field" in line


def test_tokens_of_another_vocabulary(tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", np.arange(500, dtype=np.int32))
    line = refused(tmp_path, capsys, path_option(tmp_path / "tokens.npy"))
    assert "257" in line


def test_text_shorter_than_a_row(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("only a few words here, no more")
    line = refused(tmp_path, capsys, path_option(tmp_path / "short.txt"))
    assert "config.data.length=32" in line


def test_a_sweep_axis_that_is_no_key(tmp_path, capsys):
    line = refused(tmp_path, capsys, "--config.sweep=({'model.d_modle': [16, 32]},)")
    assert "did you mean config.model.d_model?" in line
