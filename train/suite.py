"""Several runs with one command: each trains in WORKDIR/<name>, then a table and a picture compare them."""

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.config import expand_runs
from train.config_paths import Config, to_plain
from train.errors import UserError
from train.plots import learning_curves, recall_memory
from train.points import accuracy_of, display_name, mixer_of, read_points
from train.run_directory import write_atomically


def run_suite(config: Config, workdir: str | Path) -> int:
    """Trains the runs of `config.runs` in order and returns the exit code: 0, or 1 if some of them failed.

    The same command goes on where it was stopped: a finished run is not trained again, a failed one is tried again. What
    became of each run is in WORKDIR/summary.json, rewritten whole after every run.

    Raises:
      UserError: a run that cannot work, before any is trained; a directory that cannot be written.
    """
    from train.sharding import make_mesh

    workdir = Path(workdir)
    runs = expand_runs(config)
    for _, run_config in runs:
        make_mesh(run_config)
    workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for i, (name, run_config) in enumerate(runs, 1):
        print(f"[{i}/{len(runs)}] {name}", flush=True)
        results[name] = train_one(run_config, workdir / name)
        write_atomically(workdir / "summary.json", json.dumps({"runs": results}, indent=1) + "\n")
    print_table(runs, results)
    for path in draw(config, runs, workdir, results):
        print(path)
    failed = {name: result["reason"] for name, result in results.items() if "reason" in result}
    for name, reason in failed.items():
        print(f"error: run {name!r} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def train_one(config: Config, workdir: Path) -> dict[str, Any]:
    """The summary of a run or, where it failed, {"reason": one line}; what a bug raised is also in WORKDIR/error.txt."""
    from train.loop import run

    report = workdir / "error.txt"
    report.unlink(missing_ok=True)
    try:
        return dict(run(config, workdir))
    except UserError as error:
        return {"reason": str(error)}
    except Exception as error:  # one broken run must not cost the night that the others need
        text = "".join(traceback.format_exception(error))
        workdir.mkdir(parents=True, exist_ok=True)
        report.write_text(text, encoding="utf-8")
        first = str(error).splitlines()[0] if str(error) else ""
        return {"reason": f"{type(error).__name__}: {first} (traceback in {report})"}


def print_table(runs: list[tuple[str, Config]], results: Mapping[str, Mapping[str, Any]]) -> None:
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
    # in a file or a pipe a table is as wide as it needs to be
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def draw(
    config: Config,
    runs: list[tuple[str, Config]],
    workdir: Path,
    results: Mapping[str, Mapping[str, Any]],
) -> list[Path]:
    """The figure that config.plot names, and the learning curves; runs that failed are left out."""
    paths = []
    done = [name for name, _ in runs if "reason" not in results[name]]
    if config.plot == "recall_memory" and done:
        points = [point for point in read_points(workdir) if point.name in done]
        points.sort(key=lambda point: done.index(point.name))
        paths.append(recall_memory(points, workdir / "plots" / "recall_memory.png"))
    curves = learning_curves(workdir)
    return [*paths, curves] if curves else paths
