"""What the host keeps about a run that is going on: queued calls, the newest evaluation, checkpoints, clocks."""

import contextlib
import importlib.metadata
import platform
import time
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from train.checkpoint import Checkpoints
from train.config_paths import to_plain
from train.errors import UserError
from train.state import TrainState
from train.step import OWN_METRICS, Report
from train.tasks import Task

IN_FLIGHT = 2  # calls queued on the device before the host waits
SECONDS_PER_CALL = (
    2.0  # slow steps are handed out in shorter calls, so that checkpoints stay on time
)


class Session:
    """Beside the train state: everything `train.loop.train` reads, writes and waits for."""

    def __init__(
        self,
        config: ConfigDict,
        task: Task,
        model: nn.Module,
        training: Any,  # Training, or the Grid of a grid's session
        logger: Any,
        checkpoints: Checkpoints | None,
    ):
        self.config, self.task, self.model, self.training = config, task, model, training
        self.logger, self.checkpoints = logger, checkpoints
        self.evaluation: dict[str, float] = {}
        self.evaluated_step = -1
        self.best: dict[str, Any] = {}
        self.train_metrics: dict[str, float] = {}
        self.skipped = self.tokens = self._tokens_read = 0
        self.earlier_seconds = self.earlier_training_seconds = 0.0
        self.other_seconds = 0.0  # compiling and evaluating
        self.input_wait_seconds = (
            0.0  # the host waiting for data, while the device still has calls to run
        )
        self._started = self._saved = self._ready = time.monotonic()
        self._saved_step = -1
        self._queued: deque[tuple[int, int, Hashable, Any]] = deque()
        self._pace: dict[Hashable, float] = {}  # program -> seconds per step
        self._known: set[Hashable] = set()

    # --- steps ---

    def steps_per_call(self, program: Hashable) -> int:
        """config.steps_per_call, or fewer where a step is slow, and one for a program not yet seen."""
        most = max(int(SECONDS_PER_CALL / max(self._pace.get(program, SECONDS_PER_CALL), 1e-9)), 1)
        return min(self.config.steps_per_call, most)

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """What the step would wait for if no call were queued before it."""
        before = time.monotonic()
        yield
        self.input_wait_seconds += time.monotonic() - before

    @contextlib.contextmanager
    def compiling(self, program: Hashable) -> Iterator[None]:
        """The first call of a program returns when it is compiled; that time is not training."""
        before = time.monotonic()
        yield
        if program not in self._known:
            self._known.add(program)
            self._ready = time.monotonic()
            self.other_seconds += self._ready - before

    def call(self, state: Any, inputs: Any, count: int, fresh: bool, program: Hashable) -> Any:
        """The next steps, on the device: (state, report)."""
        return self.training.call(state, inputs, np.int32(count), np.bool_(fresh), program=program)

    def queue(self, step: int, count: int, program: Hashable, report: Any, state: Any) -> None:
        """Takes the report of a call that ends at `step`, and reads the oldest if too many wait."""
        self.tokens += count * self.task.tokens_per_step(program)
        self._queued.append((step, count, program, report))
        while len(self._queued) > IN_FLIGHT:
            self._read_oldest(state)

    def drain(self, state: TrainState) -> None:
        """Waits for every queued call, and writes the log lines they end on."""
        while self._queued:
            self._read_oldest(state)

    def _read_oldest(self, state: TrainState) -> None:
        step, count, program, device_report = self._queued.popleft()
        report = self.training.read(device_report)
        now = time.monotonic()
        self._pace[program] = (now - self._ready) / count
        self._ready = now
        if report.bad_streak > self.config.max_bad_steps:
            self._give_up(state, report.bad_streak)
        self._tokens_read += count * self.task.tokens_per_step(program)
        here = self.training_seconds - self.earlier_training_seconds
        self.logger.progress(step, {"tokens_per_second": self._tokens_read / max(here, 1e-9)})
        self.log_report(step, report)

    def log_report(self, step: int, report: Report) -> None:
        """A line of the log where `step` ends one."""
        self.skipped = report.skipped
        every = self.config.log.every_steps
        if (every and step % every == 0) or step == self.config.steps:
            self.train_metrics = {
                name if name in OWN_METRICS else f"train/{name}": value
                for name, value in report.means.items()
            }
            self.logger.log(step, self.train_metrics | {"skipped": report.skipped})

    def _give_up(self, state: TrainState, streak: int) -> None:
        """The device took no step after the one that was too many, whatever was still queued."""
        self._queued.clear()
        step = int(state.step)
        self.save(state, step)
        raise UserError(
            f"the gradients of {streak} steps in a row were not finite (config.max_bad_steps="
            f"{self.config.max_bad_steps}); stopped at step {step} with the last good parameters"
            f"{' in a checkpoint' if self.checkpoints else ''}; try a lower config.learning_rate or "
            "config.optimizer.clip_norm=1 in a new --workdir"
        )

    # --- evaluations ---

    def evaluate(self, state: TrainState, step: int) -> None:
        self.drain(state)
        before = time.monotonic()
        values = self.task.evaluate(self.model, state.params)
        self.evaluation = {name: float(value) for name, value in values.items()}
        self.evaluated_step = step
        self._ready = time.monotonic()
        self.other_seconds += self._ready - before
        self.logger.log(step, self.evaluation)
        metric, mode = self.task.best
        value = self.evaluation.get(metric)
        if value is None:
            raise KeyError(
                f"task {self.task.name} did not report {metric}, which picks its best checkpoint"
            )
        if not self.best or (
            value < self.best[metric] if mode == "min" else value > self.best[metric]
        ):
            self.best = {"step": step, metric: value}

    def reached_goal(self, step: int) -> bool:
        """Whether the evaluation of this very step reached config.eval.stop_value.

        Raises:
          UserError: config.eval.stop_metric is not a metric of the task.
        """
        metric = self.config.eval.stop_metric
        if not metric or self.evaluated_step != step:
            return False
        if metric not in self.evaluation:
            raise UserError(
                f"config.eval.stop_metric={metric!r} is not one of {', '.join(sorted(self.evaluation))}"
            )
        value, goal = self.evaluation[metric], self.config.eval.stop_value
        return value <= goal if _smaller_is_better(metric, self.task.best) else value >= goal

    # --- checkpoints ---

    def checkpoint_is_due(self, step: int) -> bool:
        """After an evaluation (it may be the best), at multiples of every_steps, and every_seconds after the last one."""
        if not self.checkpoints:
            return False
        busy = self.checkpoints.busy  # asked for every time, so that a full disk is known at once
        every = self.config.checkpoint.every_steps
        if self.evaluated_step == step or (every and step % every == 0):
            return True
        return self._is_late() and not busy

    def _is_late(self) -> bool:
        """Whether every_seconds will have passed when the calls that are queued are done, which `save` waits for."""
        queued = sum(count * self._pace.get(program, 0.0) for _, count, program, _ in self._queued)
        every = self.config.checkpoint.every_seconds
        return bool(every) and time.monotonic() + queued - self._saved >= every

    def save(self, state: TrainState, step: int) -> None:
        """Log lines first, so that a checkpoint never knows more than metrics.jsonl."""
        self.drain(state)
        if not self.checkpoints or step == self._saved_step:
            return
        evaluated = self.evaluated_step == step
        self._saved, self._saved_step = time.monotonic(), step
        self.checkpoints.save(step, state, self._meta(), self.evaluation if evaluated else {})

    def _meta(self) -> dict[str, Any]:
        """What a resumed run and `train.checkpoint.load_params` need to know beside the arrays."""
        return {
            "config": to_plain(self.config),
            "metric": list(self.task.best),
            "evaluation": self.evaluation,
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "train_metrics": self.train_metrics,
            "skipped": self.skipped,
            "tokens": self.tokens,
            "wall_seconds": self.wall_seconds,
            "training_seconds": self.training_seconds,
            "input_wait_seconds": self.input_wait_seconds,
            "iterator": self.task.iterator.get_state() if self.task.iterator else None,
            "versions": versions(),
        }

    def recall(self, meta: dict[str, Any], step: int) -> None:
        """Goes on from what `_meta` returned."""
        self.recall_numbers(meta, step)
        if self.task.iterator:
            self.task.iterator.set_state(meta["iterator"])

    def recall_numbers(self, meta: dict[str, Any], step: int) -> None:
        self.evaluation, self.evaluated_step = meta["evaluation"], meta["evaluated_step"]
        self.best, self.train_metrics = meta["best"], meta["train_metrics"]
        self.skipped, self.tokens = meta["skipped"], meta["tokens"]
        self.earlier_seconds = meta["wall_seconds"]
        self.earlier_training_seconds = meta["training_seconds"]
        self.input_wait_seconds = meta.get("input_wait_seconds", 0.0)
        self._saved_step = step

    # --- the end ---

    def finish(self, state: TrainState) -> None:
        """The last evaluation and checkpoint, where they are not made yet."""
        step = int(state.step)
        self.drain(state)
        if self.evaluated_step != step:
            self.evaluate(state, step)
        self.save(state, step)
        if self.checkpoints:
            self.checkpoints.close()

    @property
    def wall_seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self._started

    @property
    def training_seconds(self) -> float:
        """Without compiling and evaluating."""
        here = time.monotonic() - self._started - self.other_seconds
        return self.earlier_training_seconds + here


def versions() -> dict[str, str]:
    """What a number may depend on."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    packages = ("jaxmodels", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def _smaller_is_better(metric: str, best: tuple[str, str]) -> bool:
    if metric == best[0]:
        return best[1] == "min"
    return any(word in metric for word in ("loss", "perplexity", "error"))
