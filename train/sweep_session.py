"""What the host keeps about a grid that is going on: one session for the grid, and one for every point in it.

The grid's session hands out steps and takes the checkpoints to go on from; a point's session is that of a run of its own (its
log, evaluations, best checkpoint, early stop, failure), except that its steps are made together with those of the others.
`train.loop.train` drives the grid's session as it drives any other.
"""

import contextlib
import json
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from train import loop
from train.checkpoint import Checkpoints
from train.errors import UserError
from train.grid import Grid, with_best, without_best
from train.ledger import Ledger, outcome
from train.run_directory import write_atomically
from train.session import Session
from train.state import TrainState
from train.tasks import Task


class PointSession(Session):
    """A point of a grid. `result` is its summary once it has ended, or {"reason": why it failed}."""

    def __init__(
        self,
        name: str,
        config: ConfigDict,
        workdir: Path,
        task: Task,
        model: nn.Module,
        logger: Any,
    ):
        super().__init__(config, task, model, None, logger, None)
        self.name, self.workdir = name, workdir
        self.running = True
        self.result: dict[str, Any] = {}
        self.best_meta: dict[str, Any] = {}
        self.seconds = 0.0  # its share of the clock here, and of that what was training
        self.seconds_of_training = 0.0

    @property
    def wall_seconds(self) -> float:
        return self.earlier_seconds + self.seconds

    @property
    def training_seconds(self) -> float:
        return self.earlier_training_seconds + self.seconds_of_training

    def spend(self, seconds: float, training: bool = False) -> None:
        self.seconds += seconds
        self.seconds_of_training += seconds if training else 0.0

    def evaluate(self, state: TrainState, step: int) -> None:
        before = time.monotonic()
        super().evaluate(state, step)
        self.spend(time.monotonic() - before)
        if self.best["step"] == step:
            self.best_meta = self._meta()

    def finish_from(self, state: TrainState, best: TrainState) -> None:
        """Its best and its last checkpoint in the format of any run, and its summary."""
        self._open_checkpoints()
        if (
            self.checkpoints
            and self.config.checkpoint.keep_best
            and int(best.step) != int(state.step)
        ):
            meta = self.best_meta
            self.checkpoints.save(int(best.step), best, meta, meta["evaluation"])
        self.finish(state)
        if self.task.sample:
            sample = self.task.sample(self.model, state.params)
            write_atomically(self.workdir / "sample.txt", sample + "\n")
        self._end(loop.summarise(self, state))
        text = json.dumps(self.result, indent=1) + "\n"
        write_atomically(self.workdir / "summary.json", text)

    def fail(self, state: TrainState, streak: int) -> None:
        """Keeps the last good parameters and the reason."""
        self._open_checkpoints()
        try:
            self._give_up(state, streak)
        except UserError as error:
            self._end({"reason": str(error)})
        finally:
            if self.checkpoints:
                self.checkpoints.close()

    def _open_checkpoints(self) -> None:
        if self.config.checkpoint.enabled:
            self._saved_step = -1
            self.checkpoints = Checkpoints(self.workdir, self.config, self.task.best)

    def _end(self, result: dict[str, Any]) -> None:
        self.running, self.result = False, result
        self.logger.close()

    def note(self) -> dict[str, Any]:
        """What the grid's checkpoint keeps of it."""
        return {
            **self._meta(),
            "running": self.running,
            "result": self.result,
            "best_meta": self.best_meta,
        }

    def recall_note(self, note: dict[str, Any], step: int) -> None:
        self.recall_numbers(note, step)
        self.running = self.running and note["running"]
        self.result = self.result or note["result"]
        self.best_meta = note["best_meta"]


class GridSession(Session):
    """The session of a grid; `points` are in the order of the compiled program's."""

    def __init__(
        self,
        config: ConfigDict,
        task: Task,
        model: nn.Module,
        grid: Grid,
        logger: Any,
        checkpoints: Checkpoints | None,
        points: Sequence[PointSession],
        ledger: Ledger,
    ):
        super().__init__(config, task, model, grid, logger, checkpoints)
        self.grid, self.points, self.ledger = grid, points, ledger
        self.best_state: Any = None

    def start(self, state: Any) -> TrainState:
        """The train state to begin with, from a new one or from what a checkpoint held."""
        if hasattr(state, "best"):
            state, self.best_state = without_best(state)
        else:
            self.best_state = jax.tree.map(jnp.copy, state)
        return state

    @property
    def running(self) -> list[int]:
        return [i for i, point in enumerate(self.points) if point.running]

    # --- steps ---

    def call(self, state: Any, inputs: Any, count: int, fresh: bool, program: Hashable) -> Any:
        counts = np.zeros(self.grid.size, np.int32)
        counts[self.running] = count
        state, report = self.grid.call(
            self.grid.points, state, inputs, counts, np.bool_(fresh), program=program
        )
        return state, (report, self.running)

    @contextlib.contextmanager
    def compiling(self, program: Hashable) -> Iterator[None]:
        before = self.other_seconds
        with super().compiling(program):
            yield
        self._share(self.other_seconds - before, self.running)

    def _share(self, seconds: float, indices: Sequence[int], training: bool = False) -> None:
        for i in indices:
            self.points[i].spend(seconds / len(indices), training)

    def _read_oldest(self, state: TrainState) -> None:
        step, count, program, (device_report, indices) = self._queued.popleft()
        reports = self.grid.read(device_report)
        now = time.monotonic()
        self._pace[program] = (now - self._ready) / count
        self._share(now - self._ready, indices, training=True)
        self._ready = now
        tokens = count * self.task.tokens_per_step(program)
        self._tokens_read += tokens * len(indices)
        for i in indices:
            point = self.points[i]
            if point.running and reports[i].bad_streak > self.config.max_bad_steps:
                last = self.grid.take(state, i)
                point.fail(last, reports[i].bad_streak)
                self.ledger.update({point.name: {"steps": int(last.step)} | outcome(point.result)})
            elif point.running:
                point.tokens += tokens
                point.log_report(step, reports[i])
        here = self.training_seconds - self.earlier_training_seconds
        self.logger.progress(step, self._tokens_read / max(here, 1e-9))
        if step % self.config.log.every_steps == 0 or step == self.config.steps:
            self.logger.log(step, len(self.running), *self._best_point())

    def _best_point(self) -> tuple[str, float | None, str]:
        """(metric, its best value so far, the point that has it)."""
        metric, mode = self.task.best
        scores = {p.name: p.best[metric] for p in self.points if p.best}
        if not scores:
            return metric, None, ""
        name = (min if mode == "min" else max)(scores, key=scores.__getitem__)
        return metric, scores[name], name.rpartition("/")[2]

    # --- evaluations ---

    def evaluate(self, state: TrainState, step: int) -> None:
        """Of the points that go on; those that are at their goal or at the last step end here."""
        self.drain(state)
        before = time.monotonic()
        for i in self.running:
            point = self.points[i]
            point.evaluate(self.grid.take(state, i), step)
        better = np.array([p.running and p.best["step"] == step for p in self.points])
        self.best_state = self.grid.keep(self.best_state, state, better)
        self.evaluated_step = step
        self.ledger.update(
            {
                self.points[i].name: {
                    "steps": step,
                    "metrics": self.points[i].train_metrics | self.points[i].evaluation,
                    "wall_seconds": round(self.points[i].wall_seconds, 3),
                }
                for i in self.running
            }
        )
        for i in self.running:
            if step == self.config.steps or self.points[i].reached_goal(step):
                point = self.points[i]
                point.finish_from(self.grid.take(state, i), self.grid.take(self.best_state, i))
                self.ledger.end(point.name, point.result)
        self._ready = time.monotonic()
        self.other_seconds += self._ready - before

    def reached_goal(self, step: int) -> bool:
        """Whether no point goes on."""
        return not self.running

    # --- checkpoints ---

    def checkpoint_is_due(self, step: int) -> bool:
        return bool(self.running) and super().checkpoint_is_due(step)

    def save(self, state: TrainState, step: int) -> None:
        self.drain(state)
        super().save(with_best(state, self.best_state), step)

    def _meta(self) -> dict[str, Any]:
        return super()._meta() | {"points": {point.name: point.note() for point in self.points}}

    def recall(self, meta: dict[str, Any], step: int) -> None:
        super().recall(meta, step)
        for point in self.points:
            point.recall_note(meta["points"][point.name], step)

    def finish(self, state: TrainState) -> None:
        """The last evaluation, where it is not made yet, ends the points that are left."""
        self.drain(state)
        if self.running:
            self.evaluate(state, self.config.steps)
        if self.checkpoints:
            self.checkpoints.close()
