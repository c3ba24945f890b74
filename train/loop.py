"""The training loop: `run(config, workdir)` trains, or goes on training, or says that there is nothing left to do.

The host only hands out work: a call runs up to steps_per_call steps on the device, few calls are queued, and
what a call reports is read when a later one is already running. Every boundary (log line, evaluation, checkpoint, change of
program, end) just shortens a call; the numbers do not depend on how steps are grouped into calls.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from jaxmodels.models.language_model import build_language_model
from jaxmodels.state_size import legacy_state_bytes, state_bytes
from train.checkpoint import Checkpoints, disk_errors, restore_newest
from train.config_paths import to_plain
from train.errors import UserError
from train.logs import RunLogger
from train.run_directory import (
    keep_lines,
    open_directory,
    write_atomically,
    write_config,
    write_files,
)
from train.session import Session, versions
from train.sharding import make_mesh
from train.state import TrainState, count_parameters
from train.step import make_training
from train.tasks import build_task


def run(
    config: ConfigDict,
    workdir: str | Path,
    logger_factory: Callable[..., Any] = RunLogger,
) -> dict[str, Any]:
    """Trains `config` in `workdir` to its end and returns what summary.json holds.

    The same call on the same directory goes on from the newest checkpoint, and ends with the same bits as a run that was
    never interrupted (same device kind, same number of CPU threads). SIGTERM and Ctrl-C save a checkpoint and exit with
    128 + the signal's number (143, 130).

    Raises:
      UserError: a directory that cannot be written or belongs to another config, a config that does not fit the devices,
        a full disk, too many gradients in a row that were not finite (a checkpoint is saved first).
      SystemExit: on SIGTERM and SIGINT.
    """
    workdir = Path(workdir)
    summary = open_directory(config, workdir)
    if summary is not None:
        print(f"{workdir} is finished ({summary['steps']} steps); nothing to do")
        return summary
    use_compilation_cache(config)
    mesh = make_mesh(config)
    task = build_task(config)
    model = build_model(config)
    training = make_training(config, model, task, mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(workdir))
        write_config(config, workdir)
        write_files(task.files, workdir)
        restored = restore_newest(workdir, training.abstract)
        step = restored.step if restored else 0
        if restored:
            print(f"{workdir}: going on from step {step} of {config.steps}")
        keep_lines(workdir / "metrics.jsonl", step)
        logger = logger_factory(workdir, config, config.steps, start_step=step)
        stack.callback(logger.close)
        checkpoints = Checkpoints(workdir, config, task.best) if config.checkpoint.enabled else None
        if checkpoints:
            stack.callback(checkpoints.close)
        session = Session(config, task, model, training, logger, checkpoints)
        if restored:
            session.recall(restored.meta, step)
        stop = stack.enter_context(stop_signals())
        with session.compiling("init"):
            state = restored.tree if restored else training.init()
        state = train(session, state, step, stop)
        session.finish(state)
        if task.sample:
            sample = task.sample(model, state.params)
            print(sample)
            write_atomically(workdir / "sample.txt", sample + "\n")
        summary = summarise(session, state)
        write_atomically(workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def train(session: Session, state: TrainState, step: int, stop: list[int]) -> TrainState:
    """Steps until the last one, or until config.eval.stop_metric is reached."""
    config, task = session.config, session.task
    log_every, eval_every = config.log.every_steps, config.eval.every_steps
    save_every = config.checkpoint.every_steps
    while step < config.steps and not session.reached_goal(step):
        program, left = task.program_at(step)
        to_boundary = [n - step % n for n in (log_every, eval_every, save_every) if n]
        count = min(left, config.steps - step, session.steps_per_call(program), *to_boundary)
        fresh = step % log_every == 0 if log_every else step == 0
        with session.waiting_for_input():
            inputs = task.inputs(step, count)
        with session.compiling(program):
            state, report = session.call(state, inputs, count, fresh, program)
        step += count
        session.queue(step, count, program, report, state)
        if eval_every and step % eval_every == 0:
            session.evaluate(state, step)
        if session.checkpoint_is_due(step):
            session.save(state, step)
        if stop:
            session.save(state, step)
            name = signal.Signals(stop[0]).name
            print(f"{name}: stopped at step {step}; the same command goes on", file=sys.stderr)
            raise SystemExit(128 + stop[0])
    return state


def build_model(config: ConfigDict) -> nn.Module:
    """config.model as a language model; UserError where it cannot be one."""
    try:
        return build_language_model(**to_plain(config.model))
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error


def summarise(session: Session, state: TrainState) -> dict[str, Any]:
    """What summary.json holds: the result, its cost, and what it was made with.

    The state's bytes are those at the longest test sequence, as the papers count them.
    """
    length = session.task.state_length
    wall, training = session.wall_seconds, session.training_seconds
    return {
        "metrics": session.train_metrics | session.evaluation,
        "metric": list(session.task.best),
        "best": session.best,
        "steps": int(state.step),
        "stopped_early": int(state.step) < session.config.steps,
        "skipped": session.skipped,
        "parameters": count_parameters(state.params),
        "state_bytes": state_bytes(session.model, length),
        "legacy_state_bytes": legacy_state_bytes(session.model, length),
        "state_length": length,
        "tokens": session.tokens,
        "wall_seconds": round(wall, 3),
        "training_seconds": round(training, 3),
        "input_wait_seconds": round(session.input_wait_seconds, 3),
        "tokens_per_second": round(session.tokens / max(training, 1e-9), 1),
        "versions": versions(),
    }


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of the first SIGTERM or SIGINT; a second one ends the process as usual."""
    received: list[int] = []
    previous = {}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for known, handler in previous.items():
            signal.signal(known, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def use_compilation_cache(config: ConfigDict) -> None:
    """Keeps compiled programs between processes, so that a resumed run, or the next one of a suite, starts at once.

    config.compilation_cache: a directory; "" is JAX's own setting or else a directory of the user's cache; "off" is none.
    """
    wanted = config.get("compilation_cache", "")
    if wanted == "off" or (not wanted and jax.config.jax_compilation_cache_dir):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(wanted) if wanted else cache / "jaxmodels" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: compile every time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compilation_cache.reset_cache()  # JAX decides once per process whether it has a cache
