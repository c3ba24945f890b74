"""Training the points of one job: together as a grid, or a single one as a run; what is finished is never done again.

While a grid is going on, JOB/.grid/ holds its points (points.json) and its checkpoints; it is removed when all have ended.
"""

import contextlib
import copy
import json
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train import loop
from train.checkpoint import FOLDER, Checkpoints, disk_errors, restore_newest, steps
from train.config_paths import Config
from train.errors import UserError
from train.grid import make_grid
from train.ledger import Ledger, outcome
from train.logs import RunLogger
from train.points import read_json
from train.run_directory import (
    keep_lines,
    open_directory,
    write_atomically,
    write_config,
    write_files,
)
from train.sharding import make_mesh
from train.sweep import Job, Point
from train.sweep_progress import GridProgress
from train.sweep_session import GridSession, PointSession

Results = dict[str, dict[str, Any]]


def train_job(job: Job, workdir: Path, ledger: Ledger) -> Results:
    """Name of each point -> its summary, or {"reason": one line}.

    A point that failed with a checkpoint of its own is tried again as a run, which goes on from there; all others that are
    not finished train together. What stops the whole process (a signal) leaves them "stopped" in the ledger.
    """
    points = {point.name: point for point in job.points}
    if len(points) == 1:
        return {name: _alone(point, workdir, ledger) for name, point in points.items()}
    results = _finished(points, workdir, ledger)
    todo = [name for name in points if name not in results]
    alone = [name for name in todo if _goes_on_alone(name, workdir, ledger)]
    together = [name for name in todo if name not in alone]
    folder = workdir / job.name / ".grid"
    if not together:
        shutil.rmtree(folder, ignore_errors=True)
    while together:
        # those of a grid that was interrupted first; points that were added to the sweep since make a grid of their own
        now = [name for name in together if name in _saved_names(folder)]
        if not now:
            shutil.rmtree(folder, ignore_errors=True)
            now = together
        together = [name for name in together if name not in now]
        if len(now) == 1 and not _saved_names(folder):
            results[now[0]] = _alone(points[now[0]], workdir, ledger)
            continue
        ended, some = _together(points, now, folder, workdir, ledger)
        results |= some
        if not ended:  # its checkpoint is what the next start goes on from
            why = {"reason": "waits for the points that failed; the same command tries again"}
            results |= dict.fromkeys(together, why)
            break
        shutil.rmtree(folder, ignore_errors=True)
    results |= {name: _alone(points[name], workdir, ledger) for name in alone}
    return {name: results[name] for name in points}


def train_one(config: Config, workdir: Path) -> dict[str, Any]:
    """The summary of a run or, where it failed, {"reason": one line}; what a bug raised is also in WORKDIR/error.txt."""
    (workdir / "error.txt").unlink(missing_ok=True)
    try:
        return dict(loop.run(config, workdir))
    except UserError as error:
        return {"reason": str(error)}
    except Exception as error:  # one broken run must not cost the night that the others need
        return {"reason": _report(error, workdir)}


def train_grid(
    points: Mapping[str, Point],
    now: Sequence[str],
    folder: Path,
    workdir: Path,
    ledger: Ledger,
    logger_factory: Callable[..., Any] = RunLogger,
) -> Results:
    """Trains the points called `now` as one program to their ends, going on from the checkpoints in `folder`.

    The grid has the points that the folder's points.json lists, or else those of `now`; others than `now` take no step.
    SIGTERM and Ctrl-C save a checkpoint and exit, as for a run.

    Raises:
      UserError: what stops all of them: a full disk, a config that does not fit the devices, every checkpoint damaged.
      SystemExit: on SIGTERM and SIGINT.
    """
    names = _saved_names(folder) or list(now)
    config = points[now[0]].config
    loop.use_compilation_cache(config)
    mesh = make_mesh(config)
    task, model = loop.build_task(config), loop.build_model(config)
    configs = [points[name].config if name in points else config for name in names]
    grid = make_grid(configs, model, task, mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(folder))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "points.json", json.dumps({"points": names}))
        restored = restore_newest(folder, grid.abstract)
        step = restored.step if restored else 0
        if restored:
            print(f"{folder.parent}: going on from step {step} of {config.steps}")
        sessions = []
        for name, point_config in zip(names, configs):
            logger = contextlib.nullcontext()
            if name in now:
                logger = _open_point(point_config, workdir / name, task.files, step, logger_factory)
                stack.callback(logger.close)
            session = PointSession(name, point_config, workdir / name, task, model, logger)
            session.running = name in now
            sessions.append(session)
        progress = GridProgress(config, step)
        stack.callback(progress.close)
        checkpoints = Checkpoints(folder, config, task.best) if config.checkpoint.enabled else None
        if checkpoints:
            stack.callback(checkpoints.close)
        session = GridSession(config, task, model, grid, progress, checkpoints, sessions, ledger)
        if restored:
            session.recall(restored.meta, step)
        stop = stack.enter_context(loop.stop_signals())
        with session.compiling("init"):
            state = session.start(restored.tree if restored else grid.init())
        state = loop.train(session, state, step, stop)
        session.finish(state)
    return {session.name: session.result for session in sessions if session.name in now}


def _together(
    points: Mapping[str, Point], now: Sequence[str], folder: Path, workdir: Path, ledger: Ledger
) -> tuple[bool, Results]:
    """Whether the grid came to its end, and the results of `now`."""
    ledger.start(now)
    (folder.parent / "error.txt").unlink(missing_ok=True)
    try:
        results = train_grid(points, now, folder, workdir, ledger)
    except UserError as error:
        reason = str(error)
    except Exception as error:  # as in train_one
        reason = _report(error, folder.parent)
    except BaseException:  # a signal
        running = [name for name in now if ledger.points[name]["status"] == "running"]
        ledger.update({name: {"status": "stopped"} for name in running})
        raise
    else:
        return True, results
    results = {name: _result_so_far(name, reason, workdir, ledger) for name in now}
    ledger.update({name: outcome(result) for name, result in results.items()})
    return False, results


def _result_so_far(name: str, reason: str, workdir: Path, ledger: Ledger) -> dict[str, Any]:
    """Of a point whose grid broke off for `reason`: it may have ended before."""
    summary = read_json(workdir / name / "summary.json")
    failed = ledger.points[name]["status"] == "failed"
    return summary or {"reason": ledger.points[name]["reason"] if failed else reason}


def _alone(point: Point, workdir: Path, ledger: Ledger) -> dict[str, Any]:
    ledger.start([point.name])
    try:
        result = train_one(point.config, workdir / point.name)
    except BaseException:  # a signal
        ledger.update({point.name: {"status": "stopped"}})
        raise
    ledger.end(point.name, result)
    return result


def _finished(points: Mapping[str, Point], workdir: Path, ledger: Ledger) -> Results:
    """The summaries that are there already, and the reason for every directory that another config holds."""
    results: Results = {}
    for name, point in points.items():
        try:
            summary = open_directory(point.config, workdir / name)
        except UserError as error:
            results[name] = {"reason": str(error)}
        else:
            results |= {} if summary is None else {name: summary}
    ledger.update({name: outcome(result) for name, result in results.items()})
    return results


def _goes_on_alone(name: str, workdir: Path, ledger: Ledger) -> bool:
    return ledger.points[name]["status"] == "failed" and bool(steps(workdir / name))


def _open_point(
    config: Config,
    workdir: Path,
    files: Mapping[str, bytes],
    step: int,
    logger_factory: Callable[..., Any],
) -> Any:
    """Makes the directory that of a run at `step`, and returns its logger, which is silent on the terminal."""
    write_config(config, workdir)
    write_files(files, workdir)
    # a process that died while it ended this point may have left some; they are written again
    shutil.rmtree(workdir / FOLDER, ignore_errors=True)
    keep_lines(workdir / "metrics.jsonl", step)
    silent = copy.deepcopy(config)
    silent.log.progress = False
    return logger_factory(workdir, silent, config.steps, start_step=step)


def _saved_names(folder: Path) -> list[str]:
    """The points of the checkpoints in the folder, in their order; none where there is no checkpoint."""
    saved = read_json(folder / "points.json") if steps(folder) else None
    return list(saved["points"]) if saved else []


def _report(error: Exception, workdir: Path) -> str:
    """One line; the traceback goes into a file."""
    report = workdir / "error.txt"
    workdir.mkdir(parents=True, exist_ok=True)
    report.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first} (traceback in {report})"
