"""What a long pass over the text says on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from train.data.text.sources import Source

_PATIENCE = 5.0  # seconds without a word


@contextlib.contextmanager
def progress(source: Source, what: str) -> Iterator[Callable[[int], None]]:
    """tick(characters): after five seconds a bar on a terminal that goes away when done, elsewhere a line on stderr.

    The whole is known where the files are the text: a .txt file of ASCII has as many characters as bytes.
    """
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    begun, done, said = time.monotonic(), 0, 0.0
    plain = {part.kind for part in source.parts} == {"txt"}
    title = f"{what} {source.path or source.parts[0].name}"
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=sum(p.size for p in source.parts) if plain else None)
    state = "waiting" if sys.stderr.isatty() else "plain"

    def tick(size: int) -> None:
        nonlocal done, said, state
        done += size
        elapsed = time.monotonic() - begun
        bar.update(task, completed=done)
        if state == "waiting" and elapsed > _PATIENCE:
            try:
                bar.start()
                state = "bar"
            except LiveError:  # beside another live display
                state = "plain"
        if state == "plain" and elapsed > max(_PATIENCE, 2 * said):
            said = elapsed
            speed = done / elapsed / 1e6
            print(f"{title}: {done / 1e6:.0f} MB so far, {speed:.1f} MB/s", file=sys.stderr)

    try:
        yield tick
    finally:
        if state == "bar":
            bar.stop()
