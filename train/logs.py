"""What a run says while it runs: metrics.jsonl, TensorBoard, Weights & Biases, and a line or a bar on the terminal."""

import importlib.util
import json
import math
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.config_paths import Config, to_plain
from train.errors import UserError

SHOWN = ("loss", "accuracy", "bits_per_byte")  # metrics whose name ends so appear on the terminal


class RunLogger:
    """Logs of one run. `log` writes numbers that stay; `progress` only moves the bar and may be called often
    (its "tokens_per_second" is the rate on the terminal).

    metrics.jsonl gets one JSON object per `log` call, `{"step": ..., name: value, ...}`, flushed at once. Floats are
    written so that they read back bit for bit; a value that is not finite is null, as JSON has no word for it. Nothing
    in the file depends on the clock: two runs with the same numbers have the same file.

    Args:
      workdir: an existing directory that can be written to.
      config: the run config; reads config.log.
      total_steps: where the progress bar ends.
      start_step: the step that was restored. Later TensorBoard events in the directory are hidden.

    Raises:
      UserError: config.log.wandb without wandb installed.
    """

    def __init__(
        self,
        workdir: str | Path,
        config: Config,
        total_steps: int,
        start_step: int = 0,
    ):
        workdir = Path(workdir)
        self._wandb = _start_wandb(workdir, config) if config.log.wandb else None
        self._file = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = (
            _start_tensorboard(workdir, start_step) if config.log.tensorboard else None
        )
        self._terminal = _terminal(config, total_steps, start_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of `step` everywhere."""
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(metrics_line(step, values))
        self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._terminal:
            self._terminal.log(step, values)

    def progress(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Moves the bar to `step`; nothing where there is none."""
        if self._terminal:
            self._terminal.progress(step, metrics or {})

    def close(self) -> None:
        """Finishes every log; may be called twice."""
        self._file.close()
        if self._tensorboard:
            _close_tensorboard(self._tensorboard)
        if self._wandb:
            self._wandb.finish()
        if self._terminal:
            self._terminal.close()
        self._tensorboard = self._wandb = self._terminal = None


def metrics_line(step: int, values: Mapping[str, float | int]) -> str:
    """One line of metrics.jsonl."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": int(step), **finite}) + "\n"


def read_metrics(workdir: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl in order. A torn line (a killed writer, a full disk) is passed over."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


class _Rate:
    """Steps per second over the last few seconds, so that compilation does not spoil the estimate for long."""

    def __init__(self, step: int, seconds: float | int = 10.0):
        self._seconds, self._marks = seconds, deque([(time.monotonic(), step)])

    def __call__(self, step: int) -> float:
        now = time.monotonic()
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[1][0] > self._seconds:
            self._marks.popleft()
        then, first = self._marks[0]
        return (step - first) / (now - then) if now > then else 0.0


class _Lines:
    """Plain lines, one per `log` call: for files, pipes and notebooks."""

    def __init__(self, total: int, start: int):
        self._total, self._rate, self._speed = total, _Rate(start), ""

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        rate = self._rate(step)
        speed = _speed(values) or self._speed
        left = f"{_clock((self._total - step) / rate)} left" if rate and step < self._total else ""
        parts = [f"step {step}/{self._total}", *_shown(values), speed, left]
        print("  ".join(part for part in parts if part), flush=True)

    def progress(self, step: int, values: Mapping[str, Any]) -> None:
        self._speed = _speed(values)

    def close(self) -> None:
        pass


class _Bar:
    """A rich progress bar with the time left, the rate, and the newest loss and accuracy."""

    def __init__(self, total: int, start: int):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(*columns, refresh_per_second=4)
        self._task = self._progress.add_task(
            "train", total=total, completed=start, text="compiling"
        )
        self._newest: dict[str, Any] = {}
        self._progress.start()

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        self.progress(step, values)

    def progress(self, step: int, values: Mapping[str, Any]) -> None:
        self._newest.update(values)
        text = "  ".join((*_newest(self._newest), _speed(self._newest)))
        self._progress.update(self._task, completed=step, text=text)

    def close(self) -> None:
        self._progress.stop()


def _terminal(config: Config, total: int, start: int) -> _Bar | _Lines | None:
    if not config.log.progress:
        return None
    return (_Bar if sys.stdout.isatty() else _Lines)(total, start)


def _shown(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {float(value):.4g}"
        for name, value in values.items()
        if name.split("/")[-1] in SHOWN
    ]


def _newest(values: Mapping[str, Any]) -> list[str]:
    """One number for each of SHOWN, that of the evaluation where there is one but for the loss: a bar has little room."""
    parts = []
    for word in SHOWN:
        names = [name for name in values if name.split("/")[-1] == word]
        names.sort(key=lambda name: name.startswith("eval") == (word == "loss"))
        parts += [
            f"{name.replace('/', ' ').removeprefix('train ')} {float(values[name]):.3g}"
            for name in names[:1]
        ]
    return parts


def _speed(values: Mapping[str, Any]) -> str:
    rate = float(values.get("tokens_per_second", 0.0))
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")):
        if rate >= limit:
            return f"{rate / limit:.3g}{unit} tokens/s"
    return ""


def _clock(seconds: float | int) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _start_tensorboard(workdir: Path, start_step: int) -> Any:
    from tensorboardX import SummaryWriter

    previous = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        # On a full disk its thread dies with a traceback; the run itself says what happened, in one line.
        if not (
            isinstance(args.exc_value, OSError) and "EventLogger" in type(args.thread).__name__
        ):
            previous(args)

    threading.excepthook = hook
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1, flush_secs=10)


def _start_wandb(workdir: Path, config: Config) -> Any:
    """A run whose id lives in the directory, so that a resumed run goes on with the same curves."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("config.log.wandb=true needs wandb: pip install wandb, or leave it out")
    import wandb  # pyright: ignore[reportMissingImports]

    id_file = workdir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return wandb.init(
        project="jaxmodels",
        name=workdir.name,
        id=id_file.read_text(encoding="utf-8").strip(),
        dir=str(workdir),
        config=to_plain(config),
        resume="allow",
    )


def _close_tensorboard(writer: Any) -> None:
    """Closes the events; on a full disk gives up on them, so that no exit handler tries and fails again."""
    files = dict(writer.all_writers or {})
    try:
        writer.close()
    except OSError:
        for file in files.values():
            file.event_writer._closed = True
