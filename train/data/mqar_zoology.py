"""MQAR segments drawn as the public PyTorch repository draws them: keys, values and slots number for number.

HazyResearch/zoology (`zoology/data/multiquery_ar.py`, `zoology/data/utils.py`) draws them on the host from numpy's legacy
generator, which NEP 19 froze, so the same seed gives the same numbers on every machine and numpy version. What is ours:

- Filler. The original replaces zeros from torch's global generator, whose state depends on the model built before the
  data; nobody can reproduce it from the seed. Ours is `mqar.fill`, a function of (segment seed, example).
- num_passes > 1. The original raises there (it writes n keys into n * num_passes places); here the context is repeated
  and the numbers continue the one-pass process.

Drawing is slow on a host (tens of microseconds an example), so the arrays are kept on disk.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from train.data.mqar import Segment

Draws = dict[str, Int[np.ndarray, "n pairs"]]  # keys, values, slots: int32, as from mqar.draw

PAPER_SEED = 123  # DataConfig.seed of the original
_NAMES = ("keys", "values", "slots")
_VERSION = 1  # of the cached files
_SLOW = 5_000  # examples from which a progress bar is worth its line
_log = logging.getLogger(__name__)


def segment_seeds(
    seed: int, num_train: int, num_test: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The seed of each segment: train in [0, 2^31), test in [2^31, 2^32), so that no two sets share one.

    The original's `prepare_data`. With the same list of training segments the training data does not depend on the test.
    """
    stream = np.random.RandomState(seed)
    train = stream.randint(0, 2**31, size=num_train, dtype=np.int64)
    test = stream.randint(2**31, 2**32, size=num_test, dtype=np.int64)
    return tuple(map(int, train)), tuple(map(int, test))


def generate(segment: Segment, tick: Callable[[], None] = lambda: None) -> Draws:
    """All examples of a segment; `tick` is called once per 1000 row draws (three per example).

    The order of the draws is the original's: the keys of every example, then the values, then the slots.

    Raises:
      ValueError: the segment is endless.
    """
    count = segment.num_examples
    if count is None:
        raise ValueError("zoology data is drawn ahead of time; give the segment a num_examples")
    stream = np.random.RandomState(segment.seed)
    # float64 and this order of operations, as in the original: the generator compares against sums of p
    p = segment.power_a * np.arange(1, segment.space + 1) ** (segment.power_a - 1)
    p = p / p.sum()

    def rows(size: int, p: np.ndarray | None) -> Int[np.ndarray, "n pairs"]:
        out = np.empty((count, segment.num_kv_pairs), np.int32)
        for i in range(len(out)):
            out[i] = stream.choice(size, segment.num_kv_pairs, replace=False, p=p)
            if (i + 1) % 1000 == 0:
                tick()
        return out

    keys = 1 + rows(segment.num_keys, None)
    values = segment.vocab_size // 2 + rows(segment.num_values, None)
    return {"keys": keys, "values": values, "slots": rows(segment.space, p)}


def load(segment: Segment, cache_dir: str | Path | None = None) -> Draws:
    """`generate`, read from the cache directory when it holds this segment, and kept there otherwise.

    A cached file that cannot be read or has the wrong shape is drawn again; a directory that cannot be written costs
    a warning and no more. Several processes may fill one directory: a file appears whole or not at all.
    """
    path = cache_path(segment, cache_dir)
    draws = _read(path, segment)
    if draws is None:
        with _progress(segment) as tick:
            draws = generate(segment, tick)
        _write(path, draws)
    return draws


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/jaxmodels, by default ~/.cache/jaxmodels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmodels"


def cache_path(segment: Segment, cache_dir: str | Path | None = None) -> Path:
    """The file of a segment, named by everything that decides its numbers (the filler is not stored)."""
    fields = (
        "length",
        "num_kv_pairs",
        "num_examples",
        "vocab_size",
        "power_a",
        "num_passes",
        "seed",
    )
    identity = {name: getattr(segment, name) for name in fields} | {"version": _VERSION}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    return folder / f"mqar-L{segment.length}-kv{segment.num_kv_pairs}-{digest}.npz"


def _read(path: Path, segment: Segment) -> Draws | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            draws = {name: file[name] for name in _NAMES}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("cannot read %s (%s); drawing it again", path, error)
        return None
    shape = (segment.num_examples, segment.num_kv_pairs)
    if any(array.shape != shape or array.dtype != np.int32 for array in draws.values()):
        _log.warning("%s does not hold int32 %s; drawing it again", path, shape)
        return None
    return draws


def _write(path: Path, draws: Draws) -> None:
    """Whole or not at all: a temporary file beside the target, then a rename."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
        ) as file:
            temporary = Path(file.name)
            np.savez(file, **draws)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        _log.warning("cannot keep the generated data in %s: %s", path.parent, error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(segment: Segment) -> Iterator[Callable[[], None]]:
    """A bar on stderr that goes away when done; nothing for a small segment or beside another live display."""
    if (segment.num_examples or 0) < _SLOW:
        yield lambda: None
        return
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import Progress

    title = f"drawing MQAR length {segment.length}, {segment.num_kv_pairs} pairs"
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=3 * ((segment.num_examples or 0) // 1000))
    try:
        bar.start()
    except LiveError:
        yield lambda: None
        return
    try:
        yield lambda: bar.advance(task)
    finally:
        bar.stop()
