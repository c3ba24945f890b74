"""Several runs with one command, and the grid of learning rates and seeds of each: see train/sweep.py for what is trained.

Each point trains in a directory of its own, WORKDIR/<run>/<point>; then a table, files and pictures compare them.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.config_paths import Config, to_plain
from train.grid import check_mesh
from train.ledger import Ledger
from train.plots import PLOTS, learning_curves
from train.points import accuracy_of, display_name, mixer_of, read_points
from train.run_directory import write_atomically
from train.sharding import make_mesh
from train.sweep import Job, expand_jobs
from train.sweep_loop import train_job
from train.sweep_plots import learning_rates
from train.sweep_results import (
    Rate,
    Row,
    best_of,
    read_best_points,
    rows_of,
    statistics,
    write_results,
)

Results = Mapping[str, Mapping[str, Any]]


def run_suite(config: Config, workdir: str | Path) -> int:
    """Trains the runs of `config.runs` x `config.sweep` in order and returns the exit code: 0, or 1 if some of them failed.

    The same command goes on where it was stopped: a finished run is not trained again, a failed one is tried again. What
    became of each is in WORKDIR/summary.json, rewritten whole after every run, and in WORKDIR/ledger.json at any time.

    Raises:
      UserError: a run that cannot work, before any is trained; a directory that cannot be written.
    """
    workdir = Path(workdir)
    jobs = expand_jobs(config)
    for job in jobs:
        mesh = make_mesh(job.config)
        if len(job.points) > 1:
            check_mesh(mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(workdir / "ledger.json", [point.name for job in jobs for point in job.points])
    ledger.update({})
    results: dict[str, dict[str, Any]] = {}
    for i, job in enumerate(jobs, 1):
        grid = f"  {len(job.points)} points in one program" if len(job.points) > 1 else ""
        print(f"[{i}/{len(jobs)}] {job.name or workdir.name}{grid}", flush=True)
        results |= train_job(job, workdir, ledger)
        write_atomically(workdir / "summary.json", json.dumps({"runs": results}, indent=1) + "\n")
    report(config, jobs, workdir, ledger, results)
    failed = {name: result["reason"] for name, result in results.items() if "reason" in result}
    for name, reason in failed.items():
        print(f"error: run {name!r} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def report(
    config: Config, jobs: Sequence[Job], workdir: Path, ledger: Ledger, results: Results
) -> None:
    """The table on the terminal, the files of train/sweep_results.py and the pictures, each named in a line."""
    rows = rows_of(jobs, workdir, ledger)
    files = write_results(rows, workdir)
    if config.sweep:
        print_sweep(rows, best_of(rows))
    else:
        print_table([(job.name, job.config) for job in jobs], results)
    pictures = draw(config, jobs, workdir, results)
    rates = learning_rates(
        statistics(rows),
        workdir / "plots" / "learning_rates.png",
        {row["run"]: row["mixer"] for row in rows},
    )
    for path in [*files, *([rates] if rates else []), *pictures]:
        print(path)


def print_table(runs: list[tuple[str, Config]], results: Results) -> None:
    """One line per run: mixer, parameters, state bytes both ways, accuracy, seconds; or why it failed."""
    table = Table(box=None, header_style="bold")
    table.add_column("run")
    table.add_column("mixer")
    for title in ("parameters", "state", "state (papers)", "accuracy", "seconds"):
        table.add_column(title, justify="right")
    for name, config in runs:
        result, mixer = results[name], display_name(mixer_of(to_plain(config.model)))
        if "reason" in result:
            table.add_row(name, mixer, "failed: see below", style="red")
            continue
        accuracy = accuracy_of(result)
        table.add_row(
            name,
            mixer,
            f"{result['parameters']:,}",
            f"{result['state_bytes']:,} B",
            f"{result['legacy_state_bytes']:,} B" if "legacy_state_bytes" in result else "",
            "" if accuracy is None else f"{accuracy:.3f}",
            f"{result['wall_seconds']:.0f}",
        )
    _console().print(table)


def print_sweep(rows: Sequence[Row], best: Sequence[Rate]) -> None:
    """One line per run: its size, its best learning rate and what the seeds came to there, how many points failed."""
    table = Table(box=None, header_style="bold")
    table.add_column("run")
    table.add_column("mixer")
    titles = ("parameters", "state", "points", "best rate", "mean", "lowest ... highest", "seconds")
    for title in titles:
        table.add_column(title, justify="right")
    chosen = {b.run: b for b in best}
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == run]
        done = [row for row in mine if row["status"] == "finished"]
        failed = sum(row["status"] == "failed" for row in mine)
        points = f"{len(done)}/{len(mine)}" + (f" ({failed} failed)" if failed else "")
        mixer, seconds = display_name(mine[0]["mixer"]), sum(row["seconds"] for row in mine)
        if run not in chosen:
            table.add_row(run, mixer, "", "", points, style="red")
            continue
        b = chosen[run]
        table.add_row(
            run,
            mixer,
            f"{done[0]['parameters']:,}",
            f"{done[0]['state_bytes']:,} B",
            points,
            f"{b.learning_rate:g}",
            f"{b.mean:.4g}",
            f"{b.lowest:.4g} ... {b.highest:.4g}" if b.seeds > 1 else "",
            f"{seconds:.0f}",
        )
    if best:
        table.caption = (
            f"mean, lowest and highest: {best[0].metric} at the best rate, over its seeds"
        )
    _console().print(table)


def _console() -> Console:
    # in a file or a pipe a table is as wide as it needs to be
    return Console(width=None if sys.stdout.isatty() else 120)


def draw(config: Config, jobs: Sequence[Job], workdir: Path, results: Results) -> list[Path]:
    """The figure that config.plot names, and the learning curves; runs that failed are left out."""
    done = [name for name in results if "reason" not in results[name]]
    drawn: list[Path | None] = []
    if config.plot and done:
        if config.sweep:
            points = read_best_points(workdir)
        else:
            points = [point for point in read_points(workdir) if point.name in done]
            points.sort(key=lambda point: done.index(point.name))
        drawn.append(PLOTS[config.plot](points, workdir / "plots" / f"{config.plot}.png"))
    if config.sweep and any(len(job.points) > 1 and job.name for job in jobs):
        drawn += [learning_curves(workdir / job.name) for job in jobs]
    else:
        drawn.append(learning_curves(workdir))
    return [path for path in drawn if path]
