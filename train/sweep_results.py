"""The results of a suite or a sweep as files: every point, and of every run the best learning rate.

WORKDIR/results.csv, results.parquet   a row per point: run, axes, model, status, every final metric
WORKDIR/best.csv                       a row per run: the learning rate whose mean over the seeds is best, as in the papers
"""

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.config_paths import get_key, to_plain
from train.errors import UserError
from train.ledger import Ledger
from train.points import Point, mixer_of, read_json, read_point
from train.run_directory import write_atomically
from train.sweep import Job

SMALLER_IS_BETTER = ("loss", "perplexity", "error", "bits")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rate:
    """A learning rate of a run: mean, lowest and highest of `metric` over the seeds that came to an end.

    mode: "max" or "min", what is better. failed: the seeds that did not come to an end. points: the directories of the others.
    """

    run: str
    learning_rate: float
    metric: str
    mean: float
    lowest: float
    highest: float
    seeds: int
    failed: int
    mode: str
    points: tuple[str, ...]


def rows_of(jobs: Sequence[Job], workdir: Path, ledger: Ledger) -> list[Row]:
    """A row per point, in the order of training; what a point does not have yet is None."""
    axes = list(dict.fromkeys(path for job in jobs for point in job.points for path in point.axes))
    rows: list[Row] = []
    for job in jobs:
        for point in job.points:
            entry = ledger.points[point.name]
            summary = read_json(workdir / point.name / "summary.json") or {}
            model = to_plain(point.config.model)
            row: Row = {
                "run": job.name or workdir.name,
                "point": point.name,
                **{path: _cell(get_key(point.config, path)) for path in ["learning_rate", "seed"]},
                **{path: _cell(point.axes.get(path)) for path in axes},
                "mixer": mixer_of(model),
                "d_model": model["d_model"],
            }
            for key in ("parameters", "state_bytes", "legacy_state_bytes"):
                row[key] = summary.get(key)
            row |= {name: entry[name] for name in ("steps", "status", "reason")}
            row["seconds"] = entry["wall_seconds"]
            row["metric"], row["mode"] = metric_of(summary)
            rows.append(row | {k: v for k, v in entry["metrics"].items() if k not in row})
    return rows


def metric_of(summary: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The metric that the task chooses by, and "max" or "min"; (None, None) where the summary does not say."""
    if "metric" in summary:
        return tuple(summary["metric"])
    names = ["eval/accuracy", *summary.get("metrics", {})]
    name = next((name for name in names if name in summary.get("metrics", {})), None)
    if name is None:
        return None, None
    return name, "min" if smaller_is_better(name) else "max"


def smaller_is_better(metric: str) -> bool:
    """By its last word: loss, perplexity, bits per byte."""
    return any(word in metric.rpartition("/")[2] for word in SMALLER_IS_BETTER)


def statistics(rows: Iterable[Row]) -> dict[str, list[Rate]]:
    """run -> a Rate per learning rate, ascending; runs without a finished point are left out.

    A seed that failed is counted and has no part in the mean.
    """
    groups: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["run"], {}).setdefault(row["learning_rate"], []).append(row)
    found: dict[str, list[Rate]] = {}
    for run, by_rate in groups.items():
        for rate, points in sorted(by_rate.items()):
            done = [row for row in points if _value(row) is not None]
            values = [value for row in points if (value := _value(row)) is not None]
            if done:
                rate_of_run = Rate(
                    run=run,
                    learning_rate=rate,
                    metric=done[0]["metric"],
                    mean=sum(values) / len(values),
                    lowest=min(values),
                    highest=max(values),
                    seeds=len(values),
                    failed=sum(row["status"] == "failed" for row in points),
                    mode=done[0]["mode"],
                    points=tuple(row["point"] for row in done),
                )
                found.setdefault(run, []).append(rate_of_run)
    return found


def best_of(rows: Sequence[Row]) -> list[Rate]:
    """The best learning rate of each run."""
    return [best_rate(rates) for rates in statistics(rows).values()]


def best_rate(rates: Sequence[Rate]) -> Rate:
    """The one with the best mean over seeds; one of whose seeds some failed comes after all others."""
    sign = 1 if rates[0].mode == "min" else -1
    return min(rates, key=lambda rate: (rate.failed, sign * rate.mean))


def write_results(rows: Sequence[Row], workdir: Path) -> list[Path]:
    """results.csv, results.parquet and best.csv, each whole or as it was before."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "mode"))
    best = [dataclasses.asdict(b) | {"points": " ".join(b.points)} for b in best_of(rows)]
    contents = {
        "results.csv": _csv(rows, columns),
        "results.parquet": _parquet(rows, columns),
        "best.csv": _csv(best, [field.name for field in dataclasses.fields(Rate)]),
    }
    for name, content in contents.items():
        write_atomically(workdir / name, content)
    return [workdir / name for name in contents]


def read_best_points(workdir: str | Path) -> list[Point]:
    """A point per run of a sweep, for a figure: that of its best learning rate, with the accuracy's mean over the seeds.

    Its name is the run's. Runs without an accuracy are left out.

    Raises:
      UserError: no best.csv in the directory, or one that cannot be read.
    """
    path = Path(workdir) / "best.csv"
    if not path.is_file():
        raise UserError(
            f"{path} is missing; the training command of the sweep writes it at its end"
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            best = [(row["run"], row["points"].split(" ")) for row in csv.DictReader(file)]
    except (KeyError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not what a sweep writes; run its training command again"
        ) from error
    points = []
    for run, names in best:
        seeds = [point for name in names if (point := read_point(Path(workdir) / name))]
        if seeds:
            mean = sum(point.accuracy for point in seeds) / len(seeds)
            points.append(dataclasses.replace(seeds[0], name=run, accuracy=mean))
    return points


def _value(row: Row) -> float | None:
    """The metric of a finished point; None where there is none, or where it is not a number."""
    value = row.get(row["metric"]) if row["status"] == "finished" and row["metric"] else None
    return float(value) if value is not None and math.isfinite(value) else None


def _cell(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _parquet(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: _column([row.get(name) for row in rows]) for name in columns})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _column(values: list[Any]) -> list[Any]:
    """Values of one kind: numbers as floats where some are, everything as text where kinds are mixed."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return [None if value is None else float(value) for value in values]
    if len(kinds) > 1:
        return [None if value is None else str(value) for value in values]
    return values
