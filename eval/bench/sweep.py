"""A point inside a sweep beside a single run, and a sweep beside its runs one after the other.

    python -m eval bench --sweep [--points 4] [--mixers based] [--shapes 64x256] [--json FILE]

Steps: two processes, both warm, take turns: one moves a single run, the other a grid of --points learning rates, by calls of
--steps_per_call steps. What counts is the grid's time per step and point over the single run's time per step.

Commands: `python -m train` on the same model for --sweep_steps steps, one command per learning rate, beside one command for the
sweep; starting, compiling (with a cache of compiled programs that is warm for both), evaluations and checkpoints included.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from eval.bench.compare import parse_cases
from eval.bench.measure import check, describe
from eval.bench.timing import machine, milliseconds, seconds_of, summarise
from eval.bench.train_step import Case, Steps, case_config, set_up
from eval.bench.worker import Worker, serve
from train.errors import UserError
from train.run_directory import write_atomically

CALLS = 3  # in one turn
LIMIT = 1.05  # what a point inside a sweep may cost, over a single run


@dataclasses.dataclass(frozen=True)
class Spreads:
    """Seconds per step (and point) of the two sides, {"seconds": spread, "processor": spread} each."""

    single: dict[str, Any]
    point: dict[str, Any]

    @property
    def ratio(self) -> float:
        return self.point["seconds"]["median"] / self.single["seconds"]["median"]

    @property
    def processor_ratio(self) -> float:
        return self.point["processor"]["median"] / self.single["processor"]["median"]


class GridSteps:
    """A grid of `points` learning rates of a case, moved as `train_step.Steps` moves a single run."""

    def __init__(self, case: Case, points: int):
        from train.grid import make_grid
        from train.loop import build_model
        from train.sharding import make_mesh
        from train.tasks import build_task

        configs = [case_config(case) for _ in range(points)]
        for config, rate in zip(configs, rates(points)):
            config.learning_rate = rate
        self.task, self.points = build_task(configs[0]), points
        self.grid = make_grid(configs, build_model(configs[0]), self.task, make_mesh(configs[0]))
        self.state: Any = self.grid.init()
        self.program, _ = self.task.program_at(0)
        self.step = 0

    def call(self, count: int) -> Any:
        """One call of `count` steps of every point; returns its report, on the device."""
        counts = np.full(self.grid.size, count, np.int32)
        inputs = self.task.inputs(self.step, count)
        self.state, report = self.grid.call(
            self.grid.points, self.state, inputs, counts, np.bool_(True), program=self.program
        )
        self.step += count
        return report

    def time_calls(self, calls: int, steps: int) -> dict[str, list[float]]:
        """Per step and point, of each of `calls` calls: seconds and processor time."""
        pairs = [seconds_of(lambda: self.call(steps)) for _ in range(calls)]
        share = steps * self.points
        return {
            name: [x / share for x in column]
            for name, column in zip(("seconds", "processor"), zip(*pairs))
        }


def rates(points: int) -> list[float]:
    """Learning rates from 1e-4 to 1e-2, evenly spread on a logarithmic scale as in the papers."""
    return [float(f"{rate:.4g}") for rate in np.geomspace(1e-4, 1e-2, points)]


def run(args: argparse.Namespace) -> None:
    """Measures every case, prints the tables, and writes the JSON after each.

    Raises:
      UserError: an argument that cannot work, or a process that fails.
    """
    check(args)
    if args.points < 2:
        raise UserError(f"--points must be at least 2, not {args.points}")
    if args.sweep_steps < 0:
        raise UserError(f"--sweep_steps must not be negative, not {args.sweep_steps}")
    out = Console(markup=False, width=None if sys.stdout.isatty() else 120)
    results: dict[str, Any] = {"machine": machine(), "sweep": []}
    out.print(describe(results["machine"]), soft_wrap=True)
    tick = functools.partial(print, file=sys.stderr, flush=True)
    for case in parse_cases(args):
        spreads = compare_steps(case, args.points, args.rounds, args.steps_per_call, tick)
        row = case._asdict() | {"points": args.points, **dataclasses.asdict(spreads)}
        row |= {"ratio": spreads.ratio, "processor_ratio": spreads.processor_ratio}
        if args.sweep_steps:
            row["commands"] = compare_commands(case, args.points, args.sweep_steps, tick)
        results["sweep"].append(row)
        if args.json:
            write_atomically(args.json, json.dumps(results, indent=1) + "\n")
    out.print(table(results["sweep"]))
    for sentence in findings(results["sweep"]):
        out.print(sentence, soft_wrap=True)


def compare_steps(
    case: Case, points: int, rounds: int, steps: int, tick: Callable[[str], None]
) -> Spreads:
    """Seconds per step of a single run and of a point, from processes that take turns."""
    with ExitStack() as stack:
        sides: dict[str, Worker] = {}
        for name, count in (("single", 1), ("point", points)):
            tick(
                f"{case.mixer} {case.shape}: compiling the {'grid' if count > 1 else 'single run'}"
            )
            sides[name] = stack.enter_context(Worker(name, _command(case, count)))
        taken: dict[str, list[dict[str, list[float]]]] = {name: [] for name in sides}
        for turn in range(rounds):
            tick(f"{case.mixer} {case.shape}: round {turn + 1} of {rounds}")
            # the first side of a turn is not always the same
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                taken[name].append(sides[name].ask(calls=CALLS, steps=steps))
    joined = {
        name: summarise(
            *([x for turn in turns for x in turn[kind]] for kind in ("seconds", "processor"))
        )
        for name, turns in taken.items()
    }
    return Spreads(**joined)


def compare_commands(
    case: Case, points: int, steps: int, tick: Callable[[str], None]
) -> dict[str, float]:
    """Wall seconds of `python -m train`: the runs one after the other, and the sweep."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = root / "config.py"
        config.write_text(_CONFIG.format(case=tuple(case), steps=steps))

        def train(name: str, *overrides: str) -> float:
            command = [
                sys.executable,
                "-m",
                "train",
                f"--config={config}",
                f"--workdir={root / name}",
            ]
            begun = time.perf_counter()
            done = subprocess.run(
                [*command, f"--config.compilation_cache={root / 'cache'}", *overrides],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise UserError(f"{name}: {(done.stderr.splitlines() or ['no message'])[-1]}")
            return time.perf_counter() - begun

        sweep = f"--config.sweep=({{'learning_rate': {rates(points)}}},)"
        tick(f"{case.mixer} {case.shape}: filling the cache of compiled programs")
        train("warm_run", "--config.steps=2")
        train("warm_sweep", "--config.steps=2", sweep)
        tick(f"{case.mixer} {case.shape}: {points} runs of {steps} steps, one after the other")
        runs = [
            train(f"run{i}", f"--config.learning_rate={r}") for i, r in enumerate(rates(points))
        ]
        tick(f"{case.mixer} {case.shape}: the sweep")
        together = train("sweep", sweep)
    return {"steps": steps, "runs_seconds": sum(runs), "sweep_seconds": together}


_CONFIG = """\
from eval.bench.train_step import Case, case_config

def get_config():
    config = case_config(Case(*{case!r}))
    config.steps = {steps}
    config.steps_per_call = 32
    config.eval.every_steps = config.log.every_steps = max({steps} // 4, 1)
    config.log.progress = False
    return config
"""


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds per step with quartiles, the ratios, and the seconds of the commands."""
    result = Table(box=None, header_style="bold", title="a point inside a sweep, and a single run")
    result.add_column("mixer")
    titles = ("shape", "points", "single ms", "point ms", "ratio", "processor", "runs s", "sweep s")
    for title in titles:
        result.add_column(title, justify="right")
    for row in rows:
        commands = row.get("commands", {})
        result.add_row(
            row["mixer"],
            Case(row["mixer"], row["length"], row["batch"], row["labels"]).shape,
            str(row["points"]),
            *(_spread(row[side]["seconds"]) for side in ("single", "point")),
            f"{row['ratio']:.3f}",
            f"{row['processor_ratio']:.3f}",
            *(f"{commands[k]:.1f}" if commands else "" for k in ("runs_seconds", "sweep_seconds")),
        )
    return result


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers say, the cases that miss the limit by name."""
    slow = [f"{row['mixer']} ({row['ratio']:.3f})" for row in rows if row["ratio"] > LIMIT]
    lines = [
        f"a point costs more than {LIMIT} of a single run: {', '.join(slow)}"
        if slow
        else f"a point costs at most {LIMIT} of a single run in every case measured"
    ]
    for row in rows:
        if commands := row.get("commands"):
            share = commands["sweep_seconds"] / commands["runs_seconds"]
            lines.append(
                f"{row['mixer']}: the sweep takes {share:.2f} of the time of its runs one by one"
            )
    return lines


def _spread(spread: dict[str, float]) -> str:
    low, high = (milliseconds(spread[key]) for key in ("lower", "upper"))
    return f"{milliseconds(spread['median'])} ({low}..{high})"


def _command(case: Case, points: int) -> list[str]:
    fields = [f"--{name}={value}" for name, value in case._asdict().items()]
    return [sys.executable, "-m", "eval.bench.sweep", *fields, f"--points={points}"]


def main(arguments: list[str] | None = None) -> None:
    """One side of the comparison: compiles, says that it is ready, and answers {"calls": n, "steps": k}."""
    parser = argparse.ArgumentParser(description="One side of the sweep benchmark.")
    parser.add_argument("--mixer", required=True)
    for name in ("length", "batch", "labels", "points"):
        parser.add_argument(f"--{name}", type=int, required=True)
    fields = vars(parser.parse_args(arguments))
    points = fields.pop("points")
    case = Case(**fields)
    side = Steps(set_up(case)) if points == 1 else GridSteps(case, points)
    side.time_calls(calls=2, steps=1)  # compiles
    jax.block_until_ready(side.state)
    serve({"points": points, **case._asdict()}, side.time_calls)


if __name__ == "__main__":
    main()
