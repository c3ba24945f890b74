"""How fast text becomes tokens, and batches, on one core: every tokenizer on the same text."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.bench.timing import spread

VOCABULARY = 8192  # of the BPE that is trained for the measurement
ROWS, ROW_LENGTH = 32, 1024


def measure_text_input(
    path: str, repeats: int, tick: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """{"path", "bytes", "rows": [{"what", "seconds": spread, "rate", "unit"}]} for the text that config.data.path would take.

    Tokenising is measured whole: reading, splitting, encoding, writing the cache, into a directory that is thrown away. Run it
    with one core (`taskset -c 0`) for a figure per core.

    Raises:
      UserError: text that cannot be read.
    """
    from train.data.text import (
        TrainRows,
        documents,
        from_bytes,
        load_tokenizer,
        make_iterator,
        resolve,
        tokenizer_of,
        tokens_of,
    )

    source = resolve(path)
    size = sum(len(text.encode()) for text in documents(source, report=False))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        tick(f"training a BPE of {VOCABULARY} tokens")
        seconds = _timed(lambda: tokenizer_of("bpe", source, VOCABULARY, scratch), 1)
        rows.append(_row(f"training a BPE of {VOCABULARY}", seconds, size / 1e6, "MB/s"))
        bpe = tokenizer_of("bpe", source, VOCABULARY, scratch)
        for tokenizer in (load_tokenizer("bytes"), bpe):
            tick(f"tokenising by {tokenizer.name}")
            seconds = []
            for turn in range(repeats):
                # a tokenizer remembers the words it has seen: a fresh one, as a process that starts has
                fresh = from_bytes(tokenizer.name, tokenizer.to_json())
                folder = Path(scratch, f"{tokenizer.name}-{turn}")
                seconds += _timed(lambda t=fresh, f=folder: tokens_of(source, t, f), 1)
            rows.append(_row(f"tokenising by {tokenizer.name}", seconds, size / 1e6, "MB/s"))
        tick("batches")
        corpus = tokens_of(source, bpe, Path(scratch, "rows"))
        length = min(ROW_LENGTH, len(corpus.tokens) - 1)
        batches = make_iterator(TrainRows(corpus, length, seed=0), ROWS)
        next(batches)
        seconds = _timed(lambda: [next(batches) for _ in range(20)], repeats)
        rows.append(
            _row(f"rows of {length}, read", seconds, 20 * ROWS * length / 1e6, "M tokens/s")
        )
    # its name alone: where it lies on this machine is nobody's business in a published file
    name = Path(path).name if path else "Python's help topics"
    return {"path": name, "bytes": size, "rows": rows}


def text_input_table(result: dict[str, Any]) -> Table:
    """One line per part of the pipeline."""
    title = f"Text input: {result['path']}, {result['bytes'] / 1e6:.1f} MB"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for column in ("seconds (quartiles)", "rate"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        s = row["seconds"]
        cell = f"{s['median']:.3g} ({s['lower']:.3g} {s['upper']:.3g})"
        table.add_row(row["what"], cell, f"{row['rate']:.3g} {row['unit']}")
    return table


def _timed(call: Callable[[], Any], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _row(what: str, seconds: Sequence[float], amount: float, unit: str) -> dict[str, Any]:
    taken = spread(seconds)
    return {
        "what": what,
        "seconds": taken._asdict(),
        "rate": amount / taken.median,
        "unit": unit,
    }
