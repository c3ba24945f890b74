"""The files of a run directory that are neither logs nor checkpoints: config.json, summary.json, and metrics.jsonl cut to size."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from train.config import differences, dumps
from train.errors import UserError


def open_directory(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Makes the directory, or checks that it is this config's; returns the summary of a run that is already finished.

    Raises:
      UserError: it cannot be written, or was made with another model, data, optimiser, seed, length or task.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
        saved = _read_json(workdir / "config.json")
        if saved is not None and (changed := differences(saved, config)):
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise UserError(
                f"{workdir} holds a run of another config: {changed[0]}{more}; take another --workdir, or the old value"
            )
        return _read_json(workdir / "summary.json")
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Makes the directory this config's; for when everything that can be wrong with the config has been looked at."""
    write_atomically(workdir / "config.json", dumps(config))


def write_files(files: Mapping[str, bytes], workdir: Path) -> None:
    """What the model needs beside its parameters (`Task.files`).

    Raises:
      UserError: the directory has a file of that name with other content, from an earlier start of the run.
    """
    for name, content in files.items():
        path = workdir / name
        if not path.exists():
            write_atomically(path, content)
        elif path.read_bytes() != content:
            raise UserError(
                f"{path} is not what this config makes; the run was begun with another one: take another --workdir, or the "
                "old value"
            )


def keep_lines(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl past `step`, torn ones included; the others keep their bytes."""

    def stays(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if stays(line)]
        if kept != lines:
            write_atomically(path, b"".join(kept))


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file has its old content or the new one, whenever the process dies."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); restore it, or take another --workdir"
        ) from error
