"""Where text comes from: files, folders, globs, tensorflow-datasets, or the help topics that come with Python.

`resolve` only looks (names, sizes, times); train/data/text/readers.py reads.
"""

import glob
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError

# suffix -> kind
KINDS = {
    ".txt": "txt",
    ".md": "txt",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".npy": "npy",
}
READABLE = ", ".join(KINDS)
BUILTIN = "pydoc topics"  # what path "" stands for


@dataclass(frozen=True)
class Part:
    """One file, or one split of a tfds set.

    kind: txt, jsonl, parquet, npy, tfds or builtin.
    name: the absolute path of a file; name/split of a tfds set.
    size: bytes on disk; 0 where unknown.
    stamp: changes when the content does: the modification time of a file in ns, a version elsewhere.
    data_dir: of a tfds set.
    """

    kind: str
    name: str
    size: int
    stamp: str
    data_dir: str = ""


@dataclass(frozen=True)
class Source:
    """What `config.data.path` was found to be, and how it is to be read. Its fields decide the documents, all of them.

    path: as the user wrote it, for messages.
    parts: in the order in which they are read.
    text_field, separator, errors, max_bad_lines: the keys of config.data.
    """

    path: str
    parts: tuple[Part, ...]
    text_field: str = "text"
    separator: str = "<|endoftext|>"
    errors: str = "strict"
    max_bad_lines: int = 10

    @property
    def holds_tokens(self) -> bool:
        """Whether the parts are .npy files, tokens already."""
        return self.parts[0].kind == "npy"


def resolve(
    path: str,
    text_field: str = "text",
    separator: str = "<|endoftext|>",
    errors: str = "strict",
    max_bad_lines: int = 10,
) -> Source:
    """The parts that a path stands for: several with commas between, each a file, a folder, a glob or tfds:NAME[/SPLIT].

    A folder is searched through and through, hidden names passed over; its .md files count only where it holds nothing
    else, because beside data they describe it. Files come sorted by name. Empty files in a folder or a glob are passed
    over. A tfds set is downloaded now if it is not there yet. "" is the help topics of this Python, a document each.

    Raises:
      UserError: nothing there, nothing readable there, an empty file, tokens (.npy) and text together.
    """
    if errors not in ("strict", "replace"):
        raise UserError(f"config.data.errors must be strict or replace, got {errors!r}")
    parts: dict[str, Part] = {}
    for name in _names(path):
        parts |= {part.name: part for part in _parts_of(name)}
    found = tuple(parts.values())
    kinds = {part.kind for part in found}
    if "npy" in kinds and len(kinds) > 1:
        tokens, text = (
            next(p.name for p in found if (p.kind == "npy") == flag) for flag in (True, False)
        )
        raise UserError(
            f"config.data.path mixes tokens ({tokens}) and text ({text}); give the one or the other"
        )
    return Source(path, found, text_field, separator, errors, max_bad_lines)


def _names(path: str) -> list[str]:
    """The comma separated names; a path that exists is one name, whatever it is made of."""
    path = path.strip()
    if not path or Path(path).expanduser().exists():
        return [path]
    names = [name.strip() for name in path.split(",") if name.strip()]
    if not names:
        raise UserError(f"config.data.path is {path!r}; give a file, a folder, a glob or tfds:NAME")
    return names


def _parts_of(name: str) -> list[Part]:
    if not name:
        return [Part("builtin", BUILTIN, 0, sys.version)]
    if name.startswith("tfds:"):
        return [_tfds_part(name.removeprefix("tfds:"))]
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return [_file(path)]
    if glob.has_magic(name):
        return _matches(name)
    near = f"; {path.parent} holds {_few(path.parent)}" if path.parent.is_dir() else ""
    raise UserError(f"no file or folder {name}{near}; set --config.data.path")


def _few(folder: Path) -> str:
    """A few names of a folder, for a message."""
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"


def _folder(folder: Path) -> list[Part]:
    files = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in KINDS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    data = [file for file in files if file.suffix.lower() != ".md"]
    parts = _filled(data or files)
    if not parts:
        what = "only empty files" if files else "no file that can be read"
        raise UserError(
            f"{folder} holds {what}; readable are {READABLE}, in it there is {_few(folder)}"
        )
    return parts


def _matches(pattern: str) -> list[Part]:
    matches = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
    files = [m for m in matches if m.is_file() and m.suffix.lower() in KINDS]
    parts = _filled(files)
    if not parts:
        what = f"matches {len(matches)} names, none a filled {READABLE} file"
        raise UserError(
            f"{pattern} {what if matches else 'matches nothing'}; set --config.data.path"
        )
    return parts


def _filled(files: list[Path]) -> list[Part]:
    return [_file(file) for file in sorted(files) if file.stat().st_size]


def _file(path: Path) -> Part:
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"{path} is of a kind that cannot be read; readable are {READABLE} (rename plain text to .txt)"
        )
    try:
        with path.open("rb"):
            status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not status.st_size:
        raise UserError(f"{path} is empty; give a file with text in it")
    return Part(kind, str(path.absolute()), status.st_size, str(status.st_mtime_ns))


def _tfds_part(name: str) -> Part:
    """NAME[/CONFIG][:VERSION][/SPLIT]; without a split, train."""
    tfds = import_tfds()
    data_dir = os.environ.get("TFDS_DATA_DIR")  # tfds itself looks only when it is imported
    parent, _, last = name.rpartition("/")
    builder, split, reason = None, "", ""
    for candidate, of in ((name, "train"), *([(parent, last)] if parent else [])):
        try:
            builder, split = tfds.builder(candidate, data_dir=data_dir), of
            break
        except Exception as error:  # what it raises is tfds's own affair, down to AttributeError
            reason = reason or first_line(error)
    if builder is None:
        raise UserError(f"tensorflow-datasets has no {name!r} ({reason}); set --config.data.path")
    try:
        if not builder.info.splits:
            # read by index, which needs no TensorFlow
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise UserError(f"tfds:{name} cannot be downloaded: {first_line(error)}") from error
    splits = builder.info.splits
    base, _, version = builder.info.full_name.rpartition("/")
    full_name = f"{base}:{version}"  # the form that tfds.builder takes
    if (whole := split.partition("[")[0]) not in splits:
        raise UserError(f"tfds:{full_name} has no split {whole!r}; it has {', '.join(splits)}")
    stamp = f"{splits[split].num_examples} of {splits[whole].shard_lengths}"
    size = int(splits[split].num_bytes or 0)
    return Part("tfds", f"{full_name}/{split}", size, stamp, data_dir or "")


def import_tfds() -> Any:
    """tensorflow_datasets, or one line that says how to get it."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            "tfds:NAME needs tensorflow-datasets (no TensorFlow): pip install 'jaxmodels[data]'"
        ) from error
    return tensorflow_datasets


def first_line(error: BaseException) -> str:
    """What an exception says, cut to the line that a user's message has room for."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
