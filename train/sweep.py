"""What a sweep trains: every run of `config.runs` x every point of `config.sweep`, as jobs done one after the other.

    config.sweep = ({"learning_rate": [1e-3, 1e-2], "seed": [0, 1], "model.d_model": [64, 128]},)

is the product of its lists, as scikit-learn's ParameterGrid; several dicts are one after the other. The axes learning_rate and
seed are the grid of a job: their points train in one compiled program (train/grid.py), on the same batches. Every other axis
makes a job per value. The example is two jobs, `d_model=64` and `d_model=128`, of four points each, `lr=0.001,seed=0` ...
"""

import copy
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.config import expand_runs
from train.config_paths import Config, get_key, parse_path, set_key
from train.errors import UserError

GRID_AXES = ("learning_rate", "seed")
NO_AXES = ("runs", "sweep", "plot", "task")
SHORT = {"learning_rate": "lr"}


@dataclass(frozen=True)
class Point:
    """One model to train.

    name: its directory below the workdir, `attention,d_model=64/lr=0.001,seed=0`; "" for a run without a sweep or a name.
    axes: every axis of the sweep and its value here.
    config: what trains this point alone, with the same numbers.
    """

    name: str
    axes: Mapping[str, Any]
    config: Config = field(compare=False, repr=False)


@dataclass(frozen=True)
class Job:
    """The points that share everything but learning rate and seed; `name` is their directory below the workdir."""

    name: str
    points: tuple[Point, ...]

    @property
    def config(self) -> Config:
        """Of its first point; the others differ in learning_rate and seed only."""
        return self.points[0].config


def expand_jobs(config: Config) -> list[Job]:
    """The jobs of a config with runs, a sweep, or both, in the order of training.

    Raises:
      UserError: as expand_runs; a sweep that is no tuple of dicts of lists, an axis that is no config key, an empty list, a
        value twice, a value of another type than its key's, two points of one name.
    """
    runs = expand_runs(config) if config.runs else [("", _single(config))]
    jobs = [job for name, run in runs for job in _jobs_of(name, run, config.sweep)]
    taken: set[str] = set()
    for point in (point for job in jobs for point in job.points):
        if point.name in taken:
            raise UserError(
                f"config.sweep and config.runs train {point.name!r} twice; each point needs its own directory"
            )
        taken.add(point.name)
    return jobs


def _jobs_of(run_name: str, run: Config, sweep: Sequence[Any]) -> list[Job]:
    """The jobs of one run: dicts of the sweep that differ in grid axes only add their points to one job."""
    if not sweep:
        return [Job(run_name, (Point(run_name, {}, run),))]
    where = f"run {run_name!r}: " if run_name else ""
    dicts = [_read_axes(run, axes, f"{where}config.sweep[{i}]") for i, axes in enumerate(sweep)]
    paths = list(dict.fromkeys(path for axes in dicts for path in axes))
    outer_names = _labels(dicts, [path for path in paths if path not in GRID_AXES])
    grid_names = _labels(dicts, [path for path in paths if path in GRID_AXES])
    groups: dict[str, list[dict[str, Any]]] = {}
    for axes in dicts:
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values))
            groups.setdefault(_join(run_name, _label(point, outer_names)), []).append(point)
    jobs = []
    for name, points in groups.items():
        named = [("/".join(n for n in (name, _label(p, grid_names)) if n), p) for p in points]
        jobs.append(Job(name, tuple(Point(n, p, _point_config(run, p)) for n, p in named)))
    return jobs


def _read_axes(run: Config, axes: Any, where: str) -> dict[str, list[Any]]:
    """path -> values as the types of their keys."""
    if not isinstance(axes, Mapping) or not axes:
        raise UserError(
            f"{where} must be a dict of lists, {{'learning_rate': [1e-3, 1e-2]}}, got {axes!r}"
        )
    read: dict[str, list[Any]] = {}
    for path, values in axes.items():
        key = f"{where}[{path!r}]"
        if not isinstance(path, str) or path in NO_AXES:
            raise UserError(
                f"{where}: {path!r} cannot be an axis; take a config key like 'model.d_model'"
            )
        probe = copy.deepcopy(run)
        old = get_axis(probe, path, f"{where}: ")
        if not isinstance(values, (list, tuple)) or not values:
            raise UserError(f"{key} must be a list of at least one value, got {values!r}")
        read[path] = []
        for value in values:
            if isinstance(old, (list, tuple, Mapping)) or isinstance(value, (list, tuple, Mapping)):
                raise UserError(
                    f"{key}: {value!r} makes no name of a directory; give such values names in config.runs"
                )
            set_key(probe, path, value, where=f"{where}: ")
            read[path].append(get_key(probe, path))
        texts = [json.dumps(value) for value in read[path]]
        if len(set(texts)) < len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            raise UserError(f"{key} holds {twice} twice")
    return read


def get_axis(config: Config, path: str, where: str) -> Any:
    """The present value at the path of an axis.

    Raises:
      UserError: no such key; the nearest one is named.
    """
    try:
        return get_key(config, path)
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def _point_config(run: Config, axes: Mapping[str, Any]) -> Config:
    """The config of one point. Its data are those of the run: a seed of the grid changes initialisation and dropout only."""
    config = copy.deepcopy(run)
    if "seed" in axes and config.data.seed is None and config.data.mode != "zoology":
        config.data.seed = config.seed  # in zoology mode None is 123, whatever the seed
    for path, value in axes.items():
        set_key(config, path, value)
    return config


def _single(config: Config) -> Config:
    single = copy.deepcopy(config)
    single.runs, single.sweep, single.plot = (), (), ""
    return single


# --- names -----------------------------------------------------------------------------------------------------------


def _labels(
    dicts: Iterable[Mapping[str, list[Any]]], paths: list[str]
) -> dict[str, tuple[str, dict[str, str]]]:
    """path -> (its name, value as JSON -> text)."""
    names = _axis_names(paths)
    values = {path: [v for axes in dicts for v in axes.get(path, ())] for path in paths}
    unique = {path: list({json.dumps(v): v for v in vs}.values()) for path, vs in values.items()}
    return {path: (names[path], _texts(unique[path])) for path in paths}


def _axis_names(paths: list[str]) -> dict[str, str]:
    """As few of the last parts of each path as tell them apart: d_model, or model.window and 0.window."""
    names = {path: SHORT.get(path, _last_parts(path, 1)) for path in paths}
    length = 1
    while len(set(names.values())) < len(names):
        length += 1
        same = [path for path in paths if list(names.values()).count(names[path]) > 1]
        names |= {path: _last_parts(path, length) for path in same}
    return names


def _last_parts(path: str, count: int) -> str:
    return ".".join(str(part) for part in parse_path(path)[-count:])


def _texts(values: Sequence[Any]) -> dict[str, str]:
    """Value as JSON -> how it is called in a directory's name: numbers as short as tells them apart."""
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    texts = [text if texts.count(text) == 1 else repr(v) for text, v in zip(texts, values)]
    safe = [re.sub(r"[^\w.+-]", "_", text) or "none" for text in texts]
    names = [text if safe.count(text) == 1 else f"{text}-{i}" for i, text in enumerate(safe)]
    return {json.dumps(value): name for value, name in zip(values, names)}


def _label(point: Mapping[str, Any], labels: Mapping[str, tuple[str, dict[str, str]]]) -> str:
    """`d_model=64,window=8`: the axes of `labels` that the point has."""
    return ",".join(
        f"{name}={texts[json.dumps(point[path])]}"
        for path, (name, texts) in labels.items()
        if path in point
    )


def _join(*parts: str) -> str:
    return ",".join(part for part in parts if part)
