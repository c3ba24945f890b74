"""What the finished runs under a directory have in common to show: one point each, and the sentence they add up to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import UserError

SOLVED = 0.95  # the accuracy from which a sentence says "solves"
NAMES = {
    "attention": "attention",
    "sliding_window": "sliding window",
    "based": "BASED",
    "base_conv": "BaseConv",
    "hyena": "Hyena",
}
SHORT = {"feature_dim": "f", "window": "w", "kernel_size": "k", "num_heads": "h", "d_model": "d"}


@dataclass(frozen=True)
class Point:
    """One trained model.

    detail: the fields by which models of one mixer may differ, {"f": 16, "d": 64}.
    config: the plain config it was trained with, from which a figure says what was measured.
    """

    name: str
    mixer: str
    state_bytes: int | float
    accuracy: int | float
    detail: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_points(workdir: str | Path) -> list[Point]:
    """A point for every finished run in `workdir` or one level below it, in the order of their names.

    Raises:
      UserError: no such directory, nothing finished in it, or a summary.json that cannot be read.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"no directory {workdir}; give the --workdir of a run or a suite")
    runs = [
        path.parent
        for path in sorted([*workdir.glob("summary.json"), *workdir.glob("*/summary.json")])
    ]
    points = [point for run in runs if (point := read_point(run))]
    if not points:
        raise UserError(
            f"{workdir} holds no finished run (config.json and summary.json with an accuracy)"
        )
    return points


def read_point(run: Path) -> Point | None:
    """The point of one run; None where there is no config or no accuracy, as in the directory of a suite.

    Raises:
      UserError: a file that is not JSON.
    """
    config, summary = (read_json(run / name) for name in ("config.json", "summary.json"))
    if not config or not summary or accuracy_of(summary) is None:
        return None
    model = config["model"]
    return Point(
        name=run.name,
        mixer=mixer_of(model),
        state_bytes=summary["state_bytes"],
        accuracy=accuracy_of(summary) or 0.0,
        detail={
            SHORT.get(key, key): value
            for key, value in {**_last_mixer(model), "d_model": model["d_model"]}.items()
            if key != "name"
        },
        config=config,
    )


def mixer_of(model: Mapping[str, Any]) -> str:
    """The mixer a model is known by: that of its last layer (the first is often a short convolution)."""
    return _last_mixer(model)["name"]


def accuracy_of(summary: Mapping[str, Any]) -> float | None:
    """The overall accuracy in the metrics of a summary: eval/accuracy, or the one name that ends so."""
    metrics = summary.get("metrics", {})
    names = ["eval/accuracy", "accuracy", *(name for name in metrics if name.endswith("/accuracy"))]
    return next((float(metrics[name]) for name in names if metrics.get(name) is not None), None)


def one_line(summary: Mapping[str, Any]) -> str:
    """What a run came to: accuracy, or how well text is predicted; steps, size, state, time."""
    accuracy, metrics = accuracy_of(summary), summary.get("metrics", {})
    parts = [] if accuracy is None else [f"accuracy {accuracy:.4f}"]
    parts += [
        f"{name.replace('_', ' ')} {metrics[f'eval/{name}']:.4g}"
        for name in ("bits_per_byte", "perplexity")
        if f"eval/{name}" in metrics
    ]
    parts += [
        f"{summary['steps']} steps",
        f"{summary['parameters']:,} parameters",
        f"state {summary['state_bytes']:,} bytes",
        f"{summary['wall_seconds']:.0f} s",
    ]
    return ", ".join(parts)


def display_name(mixer: str) -> str:
    """How a mixer is called in a picture."""
    return NAMES.get(mixer, mixer.replace("_", " "))


def detail_labels(points: Sequence[Point]) -> dict[str, str]:
    """name -> "f=16": the fields in which the points of that mixer differ; "" for a mixer with one point."""
    labels: dict[str, str] = {}
    for point in points:
        siblings = [p.detail for p in points if p.mixer == point.mixer]
        differing = [
            key for key in point.detail if len({str(detail.get(key)) for detail in siblings}) > 1
        ]
        labels[point.name] = " ".join(f"{key}={point.detail[key]}" for key in differing)
    return labels


def describe(points: Sequence[Point], width: bool = True) -> str:
    """What all points have in common: "MQAR, 64 tokens with 4 pairs, vocabulary 8192, width 64"; `width` False leaves it out."""
    parts = [
        (lambda c: c["task"].upper()),
        (lambda c: _segments_text(c["data"]["test"]) if c["task"] == "mqar" else ""),
        (lambda c: f"vocabulary {c['model']['vocab_size']}"),
        (lambda c: f"width {c['model']['d_model']}" if width else ""),
    ]
    if not points or not all(point.config for point in points):
        return ""
    texts = [{part(point.config) for point in points} for part in parts]
    return ", ".join(text for same in texts if len(same) == 1 for text in same if text)


def _segments_text(segments: Sequence[Mapping[str, Any]]) -> str:
    texts = [f"{s['length']} tokens with {s['num_kv_pairs']} pairs" for s in segments]
    if len(texts) <= 3:
        return " / ".join(texts)
    last = segments[-1]
    return f"{texts[0]} to {last['length']} with {last['num_kv_pairs']}"


def segment_of(point: Point) -> tuple[int, int]:
    """(length, pairs) of the segment that the model was tested on; (0, 0) for several, or where no config says it."""
    segments = point.config["data"]["test"] if point.config.get("task") == "mqar" else ()
    sizes = {(s["length"], s["num_kv_pairs"]) for s in segments}
    return sizes.pop() if len(sizes) == 1 else (0, 0)


def segment_text(test: tuple[int, int]) -> str:
    """(64, 4) -> "64 tokens, 4 pairs"."""
    return f"{test[0]} tokens, {test[1]} pairs" if test != (0, 0) else "several lengths"


def claim(points: Sequence[Point], given: str = "state") -> str:
    """The sentence that the points support: which mixers reach SOLVED always, at some sizes of what is `given`, or never.

    >>> claim([Point("a", "attention", 1, 1.0), Point("h", "hyena", 1, 0.3)])
    'Attention solves associative recall; Hyena does not'
    """
    if any(point.config.get("task", "mqar") != "mqar" for point in points):
        return f"Accuracy against {given}"
    always, sometimes, never = [], [], []
    for mixer in dict.fromkeys(point.mixer for point in points):
        solved = [p.accuracy >= SOLVED for p in points if p.mixer == mixer]
        (always if all(solved) else sometimes if any(solved) else never).append(display_name(mixer))
    if not always and not sometimes:
        return "No mixer solves associative recall here"
    parts = []
    if always:
        parts.append(f"{_words(always)} {_verb(always, 'solve')} associative recall")
    if sometimes:
        solves = "" if always else f" {_verb(sometimes, 'solve')} associative recall"
        parts.append(f"{_words(sometimes)}{solves} given enough {given}")
    text = ", ".join(parts)
    if never:
        text += f"; {_words(never)} {_verb(never, 'do')} not"
    return text[0].upper() + text[1:]


def _verb(subjects: Sequence[str], verb: str) -> str:
    if len(subjects) > 1:
        return verb
    return {"do": "does"}.get(verb, verb + "s")


def _words(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _last_mixer(model: Mapping[str, Any]) -> Mapping[str, Any]:
    return model["mixers"][(model["num_layers"] - 1) % len(model["mixers"])]


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file.

    Raises:
      UserError: it is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not readable JSON ({error}); run the training command again"
        ) from error
