"""A grid on the terminal: a bar, or a line per log step, for all points together."""

import sys
import time
from typing import Any

from ml_collections import ConfigDict


class GridProgress:
    """`step 50/1000  4 points  best eval/accuracy 0.99 (lr=0.01,seed=0)  1.2M tokens/s  0:40 left`; nothing where config.log.progress is off."""

    def __init__(self, config: ConfigDict, start_step: int = 0):
        self._on, self._total, self._start = config.log.progress, config.steps, start_step
        self._began, self._speed = time.monotonic(), 0.0
        self._bar = (
            _start_bar(self._total, start_step) if self._on and sys.stdout.isatty() else None
        )

    def progress(self, step: int, tokens_per_second: float) -> None:
        """Moves the bar; nothing where there is none."""
        self._speed = tokens_per_second
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def log(self, step: int, points: int, metric: str, best: float | None, name: str) -> None:
        """points: how many go on. best: the best value of `metric` so far, of the point called `name`."""
        parts = [f"{points} point{'s' if points != 1 else ''}"]
        parts += [] if best is None else [f"best {metric} {best:.4g} ({name})"]
        parts += [f"{self._speed / 1e3:,.0f}k tokens/s"]
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, text="  ".join(parts))
        elif self._on:
            print("  ".join([f"step {step}/{self._total}", *parts, *self._left(step)]), flush=True)

    def _left(self, step: int) -> list[str]:
        done = step - self._start
        if done <= 0 or step >= self._total:
            return []
        seconds = (time.monotonic() - self._began) / done * (self._total - step)
        return [f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"]

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _start_bar(total: int, start: int) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.fields[text]}")
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), text)
    bar = Progress(*columns, refresh_per_second=4)
    bar.add_task("train", total=total, completed=start, text="compiling")
    bar.start()
    return bar
