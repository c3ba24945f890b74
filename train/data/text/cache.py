"""The tokens of a source, made once and kept on disk.

A cache entry is a folder `text-<digest>` with the tokens of all documents, one after the other, the end token before each,
and where each begins. The digest is of everything that decides them: names, sizes and times of the files, how they are
read, the tokenizer. An entry appears whole or not at all, so that any number of processes may make it at once.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64, Integer

from train.data.mqar_zoology import default_cache_dir
from train.data.text.progress import progress
from train.data.text.readers import Piece, documents, pieces, token_arrays
from train.data.text.sources import Source
from train.data.text.tokenizers import Tokenizer, from_bytes, load_tokenizer, train_bpe
from train.errors import UserError
from train.run_directory import write_atomically

_VERSION = 1  # of the cached files
_BATCH = 1 << 20  # characters encoded together
_TEMPORARY = ".text-being-made-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents one after the other, each [end, t_1, ..., t_n].

    tokens: in memory or mapped from a file.
    starts: where documents begin, increasing, the first 0.
    """

    tokens: Integer[np.ndarray, "tokens"]
    starts: Int64[np.ndarray, "docs"]


def tokens_of(source: Source, tokenizer: Tokenizer, cache_dir: str | Path = "") -> Corpus:
    """The documents of a source as tokens: from the cache where it has them, made and kept otherwise.

    Tokens are uint16 where the vocabulary allows, otherwise int32, mapped, not read. .npy sources are their own tokens: one
    file is mapped as it is; documents begin at its first token and, unless the tokenizer is "bytes", wherever `end` stands.
    An entry that is damaged is made again. A directory that cannot be written costs a warning, and the work at every start.

    Args:
      cache_dir: "" = the user's cache directory ($XDG_CACHE_HOME/jaxmodels).

    Raises:
      UserError: see `readers.pieces`; no text at all; no room for the tokens.
    """
    folder = _folder(cache_dir)
    if source.holds_tokens and len(source.parts) == 1:
        [tokens] = token_arrays(source)
        return Corpus(tokens, _starts(tokens, tokenizer))
    entry = folder / f"text-{_digest(source, tokenizer.to_json())}"
    corpus = _open(entry)
    if corpus is not None:
        return corpus
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=_TEMPORARY)
    except OSError as error:
        _log.warning("cannot keep the tokens in %s: %s", folder, error)
        temporary = tempfile.TemporaryDirectory(prefix="jaxmodels-text-")
    with temporary as name:
        made = Path(name) / "entry"
        _make(source, tokenizer, made)
        if made.is_relative_to(folder):
            _put(made, entry)
        # where it could not be kept, the mapping outlives the names of its files
        corpus = _open(entry) or _open(made)
    if corpus is None:
        raise UserError(f"the tokens written to {folder} do not read back; is the disk sound?")
    return corpus


def tokenizer_of(
    spec: str, source: Source, vocab_size: int, cache_dir: str | Path = ""
) -> Tokenizer:
    """`load_tokenizer`, or for "bpe" one trained on the source, which is kept in the cache directory too.

    Raises:
      UserError: see `load_tokenizer`, `train_bpe`; "bpe" for a source that is tokens already.
    """
    if spec != "bpe":
        return load_tokenizer(spec)
    if source.holds_tokens:
        raise UserError(
            f"{source.path} holds tokens, on which no bpe can be trained; give the tokenizer.json they were made with, or bytes"
        )
    folder = _folder(cache_dir)
    path = folder / f"bpe-{_digest(source, str(vocab_size).encode())}.json"
    with contextlib.suppress(OSError, UserError):
        return from_bytes("bpe", path.read_bytes())
    with progress(source, "training the tokenizer on") as tick:
        tokenizer = train_bpe(_ticking(documents(source, report=False), tick), vocab_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, tokenizer.to_json())
    except OSError as error:
        _log.warning("cannot keep the tokenizer in %s: %s", folder, error)
    return tokenizer


def check_ids(corpus: Corpus, vocab_size: int, name: str = "the data") -> None:
    """Raises UserError where a token is not in [0, vocab_size): data of another tokenizer."""
    for start in range(0, len(corpus.tokens), 1 << 22):
        block = np.asarray(corpus.tokens[start : start + (1 << 22)])
        wrong = np.flatnonzero((block < 0) | (block >= vocab_size))
        if len(wrong):
            raise UserError(
                f"{name} has token {block[wrong[0]]} at position {start + wrong[0]}, the vocabulary is 0 to "
                f"{vocab_size - 1}; set config.model.vocab_size, or give data of the same tokenizer"
            )


def _starts(
    tokens: Integer[np.ndarray, "tokens"], tokenizer: Tokenizer
) -> Int64[np.ndarray, "docs"]:
    """0 and the places of `end`, read in blocks."""
    found = [np.zeros(1, np.int64)]
    if tokenizer.name != "bytes":
        for start in range(0, len(tokens), 1 << 22):
            block = tokens[start : start + (1 << 22)]
            found.append(start + np.flatnonzero(block == tokenizer.end).astype(np.int64))
    return np.unique(np.concatenate(found))


def _digest(source: Source, more: bytes) -> str:
    settings = asdict(source) | {"path": "", "version": _VERSION}
    identity = json.dumps(settings, sort_keys=True).encode() + b"\n" + more
    return hashlib.sha256(identity).hexdigest()[:20]


def _make(source: Source, tokenizer: Tokenizer, entry: Path) -> None:
    """Writes an entry."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    starts: list[int] = []
    try:
        entry.mkdir()
        with (entry / "tokens.bin").open("wb") as file:
            if source.holds_tokens:
                dtype, starts = _join(source, tokenizer, file)
            else:
                with progress(source, "tokenising") as tick:
                    _encode(source, tokenizer, dtype, starts, file, tick)
            count = file.tell() // dtype.itemsize
            file.flush()
            os.fsync(file.fileno())
        if not count:
            raise UserError(f"{source.path} holds no text, only white space")
        np.save(entry / "starts.npy", np.array(starts, np.int64))
        meta = {"version": _VERSION, "dtype": dtype.name, "tokens": count, "docs": len(starts)}
        write_atomically(entry / "meta.json", json.dumps(meta) + "\n")
    except OSError as error:
        raise UserError(
            f"the tokens of {source.path} cannot be written: {error.strerror}; "
            "make room, or set --config.data.cache_dir to another disk"
        ) from error


def _encode(
    source: Source,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    starts: list[int],
    file: BinaryIO,
    tick: Callable[[int], None],
) -> None:
    end = np.array([tokenizer.end], dtype)
    stream = pieces(source) if tokenizer.can_cut else ((True, d) for d in documents(source))
    position = 0
    for batch in _batches(stream):
        encoded = tokenizer.encode_batch([text for _, text in batch])
        out: list[np.ndarray] = []
        for (begins, _), ids in zip(batch, encoded):
            if begins:
                starts.append(position)
                out.append(end)
            out.append(ids.astype(dtype))
            position += begins + len(ids)
        file.write(np.concatenate(out).tobytes())
        tick(sum(len(text) for _, text in batch))


def _batches(stream: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Lists of about _BATCH characters."""
    batch: list[Piece] = []
    size = 0
    for piece in stream:
        batch.append(piece)
        size += len(piece[1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _join(source: Source, tokenizer: Tokenizer, file: BinaryIO) -> tuple[np.dtype, list[int]]:
    """Several .npy files as one; each begins a document."""
    arrays = token_arrays(source)
    dtype = np.result_type(*arrays)
    starts, position = [], 0
    for array in arrays:
        starts += (position + _starts(array, tokenizer)).tolist()
        for i in range(0, len(array), 1 << 22):
            file.write(array[i : i + (1 << 22)].astype(dtype).tobytes())
        position += len(array)
    return dtype, starts


def _folder(cache_dir: str | Path) -> Path:
    return (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()).absolute()


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed have left, a day later."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (path, *path.rglob("*"))) > 86_400:
                shutil.rmtree(path)


def _put(made: Path, entry: Path) -> None:
    """The entry under its name; one that is there and can be read stays, as another process has just made it."""
    for _ in range(3):
        try:
            made.rename(entry)
            return
        except OSError:  # there is one already
            if _open(entry) is not None:
                return
            damaged = made.parent / "damaged"
            with contextlib.suppress(OSError):
                entry.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)


def _open(entry: Path) -> Corpus | None:
    """An entry; None where there is none or it is damaged."""
    try:
        meta: dict[str, Any] = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        starts = np.load(entry / "starts.npy", allow_pickle=False)
        dtype, count = np.dtype(meta["dtype"]), meta["tokens"]
        if (entry / "tokens.bin").stat().st_size != count * dtype.itemsize:
            raise ValueError("tokens.bin has another size")
        if len(starts) != meta["docs"] or starts[0] != 0 or starts[-1] >= count:
            raise ValueError("starts.npy is another entry's")
        return Corpus(np.memmap(entry / "tokens.bin", dtype, mode="r", shape=(count,)), starts)
    except FileNotFoundError as error:
        if entry.exists():
            _log.warning("%s is not whole (%s); making it again", entry, error.filename)
    except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError) as error:
        _log.warning("cannot read %s (%s); making it again", entry, error)
    return None


def _ticking(texts: Iterator[str], tick: Callable[[int], None]) -> Iterator[str]:
    for text in texts:
        yield text
        tick(len(text))
