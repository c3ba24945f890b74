"""The documents of a source, in order, streamed: no file is held whole unless it is one line.

A document comes in one piece or several, cut only where GPT-2's pattern begins a new word in any case (`CUT` in
train/data/text/words.py): a tokenizer of that pattern gives the same tokens for the pieces as for the whole.
"""

import codecs
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from jaxtyping import Integer

from train.data.text.sources import Part, Source, first_line, import_tfds
from train.data.text.words import CUT
from train.errors import UserError

Piece: TypeAlias = tuple[bool, str]  # (whether it begins a document, text)

BLOCK = 1 << 22  # bytes read at a time
_CUT_WINDOW = 1 << 16  # where the last cut of a block is looked for


def documents(source: Source, report: bool = True) -> Iterator[str]:
    """Every document that is not only white space, whole; see `pieces` for what is raised."""
    parts: list[str] = []
    for begins, text in pieces(source, report):
        if begins and parts:
            yield "".join(parts)
            parts = []
        parts.append(text)
    if parts:
        yield "".join(parts)


def pieces(source: Source, report: bool = True) -> Iterator[Piece]:
    """(begins a document, text) in order; a document of white space only is dropped.

    .txt: lines that hold nothing but source.separator stand between documents; a byte order mark is dropped and line ends
    are kept as they are. .jsonl: a document per line. .parquet: one per row, read by row group. tfds: one per example.

    Args:
      report: say on stderr, at the end, how many lines were passed over.

    Raises:
      UserError: bytes that are not UTF-8 (unless source.errors is "replace"), more unreadable lines than
        source.max_bad_lines, a file that is cut short, a field that does not exist. The place is named.
    """
    bad = _BadLines(source.max_bad_lines)
    for part in source.parts:
        try:
            if part.kind == "txt":
                yield from _text(part, source)
            else:
                reader = {"jsonl": _jsonl, "parquet": _parquet, "tfds": _tfds, "builtin": _builtin}
                for text in reader[part.kind](part, source, bad):
                    if text and not text.isspace():
                        yield True, text
        except OSError as error:
            raise UserError(f"{part.name} cannot be read: {first_line(error)}") from error
    if report:
        bad.report()


def token_arrays(source: Source) -> list[Integer[np.ndarray, "tokens"]]:
    """The arrays of .npy parts, mapped, not read.

    Raises:
      UserError: a file that is no .npy array, not one-dimensional, or not of integers.
    """
    arrays = []
    for part in source.parts:
        try:
            array = np.load(part.name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{part.name} is not a whole .npy file: {first_line(error)}; write it with numpy.save"
            ) from error
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise UserError(
                f"{part.name} holds {array.dtype}{list(array.shape)}; tokens are one dimension of integers, e.g. uint16"
            )
        if not len(array):
            raise UserError(f"{part.name} is empty; give a file with tokens in it")
        arrays.append(array)
    return arrays


def _text(part: Part, source: Source) -> Iterator[Piece]:
    """A .txt file: blocks of whole lines, cut at separator lines, each stretch cut again where a word begins."""
    separator = source.separator.strip()
    line = rf"^[ \t]*{re.escape(separator)}[ \t]*\r?(?:\n|\Z)"
    pattern = re.compile(line, re.MULTILINE) if separator else None
    held, begins = "", True  # text of this document that is not given yet; whether none was
    for block in _blocks(part, source.errors, whole_lines=pattern is not None):
        *ended, rest = (
            pattern.split(block) if pattern is not None and separator in block else [block]
        )
        for text in ended:
            text, held = held + text, ""
            if not (begins and _blank(text)):
                yield begins, text
            begins = True
        held += rest
        if cut := _last_cut(held):
            yield begins, held[:cut]
            held, begins = held[cut:], False
    if held and not (begins and _blank(held)):
        yield begins, held


def _blank(text: str) -> bool:
    return not text or text.isspace()


def _last_cut(text: str) -> int:
    """The last place within the window where a cut changes no token; 0 where there is none."""
    start = max(0, len(text) - _CUT_WINDOW)
    return max((match.start() for match in CUT.finditer(text, start)), default=0)


def _blocks(part: Part, errors: str, whole_lines: bool) -> Iterator[str]:
    """The decoded file, BLOCK bytes at a time; with `whole_lines` each block but the last ends with a line break."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    carry, offset = "", 0
    with open(part.name, "rb") as file:
        while True:
            data = file.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                position = offset - pending + error.start
                raise _not_utf8(part.name, position, error) from error
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset += len(data)
            carry += text
            end = carry.rfind("\n") + 1 if whole_lines and data else len(carry)
            if end:
                yield carry[:end]
                carry = carry[end:]
            if not data:
                return


def _jsonl(part: Part, source: Source, bad: "_BadLines") -> Iterator[str]:
    offset, seen = 0, False
    with open(part.name, "rb") as file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                start = offset - len(line)
            where = f"{part.name} line {number}"
            try:
                text = line.decode("utf-8", source.errors)
            except UnicodeDecodeError as error:
                raise _not_utf8(part.name, start + error.start, error) from error
            if text.isspace():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                bad.add(f"{where} is not JSON ({error})")
                continue
            value = record.get(source.text_field) if isinstance(record, dict) else None
            if isinstance(value, str):
                seen = True
                # half of a surrogate pair, which JSON can spell and UTF-8 cannot
                if (whole := _encodable(value, source.errors)) is None:
                    bad.add(f"{where} holds half of a surrogate pair")
                else:
                    yield whole
                continue
            fields = ", ".join(map(repr, record)) if isinstance(record, dict) else ""
            has = f"it has {fields}" if fields else "it is no object with fields"
            reason = f"{where} has no text in field {source.text_field!r}; {has}"
            if not seen:  # not one good line: the name is wrong, not the file
                raise UserError(f"{reason}; set --config.data.text_field")
            bad.add(reason)


def _encodable(text: str, errors: str) -> str | None:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        if errors == "strict":
            return None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet(part: Part, source: Source, bad: "_BadLines") -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, column = part.name, source.text_field
    try:
        with pq.ParquetFile(name) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise UserError(
                    f"{name} has no column {column!r}; it has {', '.join(map(repr, schema.names))}; "
                    "set --config.data.text_field"
                )
            kind = schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                    raise UserError(f"{name} column {column!r} holds {kind}, not text")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    row += 1
                    if value is not None:
                        yield _decode(value, f"{name} row {row}", source.errors)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name} is not a whole parquet file (cut short?): {first_line(error)}"
        ) from error


def _tfds(part: Part, source: Source, bad: "_BadLines") -> Iterator[str]:
    full_name, _, split = part.name.rpartition("/")
    builder = import_tfds().builder(full_name, data_dir=part.data_dir or None)
    features = sorted(builder.info.features or {})
    if source.text_field not in features:
        raise UserError(
            f"tfds:{full_name} has no feature {source.text_field!r}; it has {', '.join(map(repr, features))}; "
            "set --config.data.text_field"
        )
    try:
        examples = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"tfds:{full_name} is stored as {builder.info.file_format.value}, which needs TensorFlow; "
            "prepare it again with file_format='array_record'"
        ) from error
    for i in range(len(examples)):
        value = examples[i][source.text_field]
        if isinstance(value, str):
            yield value
        elif isinstance(value, bytes):
            yield _decode(value, f"tfds:{part.name} example {i}", source.errors)
        else:
            raise UserError(
                f"tfds:{full_name} feature {source.text_field!r} is not text; it has {', '.join(map(repr, features))}"
            )


def _builtin(part: Part, source: Source, bad: "_BadLines") -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _decode(value: bytes, where: str, errors: str) -> str:
    try:
        return value.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error.start, error) from error


def _not_utf8(where: str, position: int, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{where}: byte {position} (0x{error.object[error.start]:02x}) is not UTF-8; convert the text, "
        "or give --config.data.errors=replace"
    )


@dataclass
class _BadLines:
    """Lines that were passed over: how many, and which was the first."""

    limit: int
    count: int = 0
    first: str = field(default="")

    def add(self, what: str) -> None:
        """Raises UserError past the limit."""
        self.count += 1
        self.first = self.first or what
        if self.count > self.limit:
            raise UserError(
                f"{what}; {self.count} unreadable lines, more than config.data.max_bad_lines={self.limit}"
            )

    def report(self) -> None:
        if self.count:
            lines = "line" if self.count == 1 else "lines"
            print(f"passed over {self.count} unreadable {lines}: {self.first}", file=sys.stderr)
