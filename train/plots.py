"""The pictures of a run or a suite: recall against memory, and learning curves.

Labels stand beside what they name instead of in a legend; colours are a palette that colour-blind readers can tell apart
(Okabe and Ito), and every mixer has a marker of its own besides. Files are written whole or not at all.
"""

import itertools
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.logs import read_metrics
from train.points import Point, claim, describe, detail_labels, display_name, mixer_of, read_json

# mixer -> colour, marker. Mixers without an entry take OTHERS in turn.
STYLES: dict[str, tuple[str, str]] = {
    "attention": ("#1a1a1a", "o"),
    "sliding_window": ("#0072b2", "s"),
    "based": ("#d55e00", "D"),
    "base_conv": ("#009e73", "^"),
    "hyena": ("#b5478e", "v"),
}
OTHERS = (("#e69f00", "P"), ("#56b4e9", "X"), ("#7a5195", "h"), ("#6b6b6b", "p"))
PALETTE = tuple(colour for colour, _ in (*STYLES.values(), *OTHERS))
GREY = "#5f6368"


class Label(NamedTuple):
    """A text to stand beside a point: the name of a mixer (large), or what sets the point apart from its siblings."""

    x: int | float
    y: int | float
    text: str
    colour: str
    is_name: bool


def recall_memory(points: Sequence[Point], path: str | Path) -> Path:
    """Recall (accuracy) against state bytes per sequence, log x. The title is the claim that the points support."""
    figure, axes = _canvas((7.2, 4.6))
    details = detail_labels(points)
    axes.set_xscale("log")
    texts: list[Label] = []
    for mixer, (colour, marker) in _styles(points).items():
        mine = sorted((p for p in points if p.mixer == mixer), key=lambda p: p.state_bytes)
        xs, ys = [p.state_bytes for p in mine], [p.accuracy for p in mine]
        axes.plot(xs, ys, color=colour, lw=1.6, alpha=0.55, zorder=2)
        axes.scatter(xs, ys, color=colour, marker=marker, s=52, zorder=3, edgecolor="white", lw=0.8)
        named = max(mine, key=lambda p: (p.accuracy, -p.state_bytes))
        texts.append(Label(named.state_bytes, named.accuracy, display_name(mixer), colour, True))
        texts += [
            Label(p.state_bytes, p.accuracy, details[p.name], colour, False)
            for p in mine
            if details[p.name]
        ]
    low, high = min(p.state_bytes for p in points), max(p.state_bytes for p in points)
    axes.set_xlim(low / 1.9, high * 2.6)
    axes.set_ylim(-0.06, 1.1)
    _byte_ticks(axes)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("state per sequence while decoding")
    _title(axes, claim(points), _join("recall accuracy", describe(points)))
    _place_labels(axes, sorted(texts, key=lambda t: not t.is_name))
    return _save(figure, Path(path))


def learning_curves(workdir: str | Path, path: str | Path | None = None) -> Path | None:
    """Loss and accuracy against steps for the run in `workdir`, or for the runs below it; None where nothing was logged."""
    workdir = Path(workdir)
    found = sorted([*workdir.glob("metrics.jsonl"), *workdir.glob("*/metrics.jsonl")])
    runs = {file.parent.name: list(read_metrics(file.parent)) for file in found}
    colours = {file.parent.name: _run_colour(file.parent) for file in found}
    panels = [
        (title, curves)
        for title, ending in (("loss", "loss"), ("accuracy", "accuracy"))
        if (curves := _curves(runs, ending))
    ]
    if not panels:
        return None
    figure, all_axes = _canvas((5.4 * len(panels), 3.8), columns=len(panels))
    for axes, (title, curves) in zip(all_axes if len(panels) > 1 else [all_axes], panels):
        ends = []
        for i, (name, (steps, values)) in enumerate(curves.items()):
            colour = colours.get(name) or PALETTE[i % len(PALETTE)]
            axes.plot(steps, values, color=colour, lw=1.6, marker="o" if len(steps) == 1 else "")
            ends.append((values[-1], name, colour))
        if title == "accuracy":
            axes.set_ylim(-0.02, 1.05)
        axes.set_xlabel("step")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        _label_ends(axes, ends)
    return _save(figure, Path(path or workdir / "plots" / "learning_curves.png"))


def _canvas(size: tuple[float, float], columns: int = 1) -> tuple[Any, Any]:
    """A figure that belongs to no window and no global state, with a light grid and no frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, columns)
    for axes in all_axes if columns > 1 else [all_axes]:
        axes.grid(True, color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b0b0b0")
        axes.tick_params(colors=GREY, labelsize=9, which="both")
        axes.xaxis.label.set_color(GREY)
    return figure, all_axes


def _title(axes: Any, text: str, subtitle: str) -> None:
    title = textwrap.fill(text, 62)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=26)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=9.5, color=GREY)


def _styles(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    mixers = list(dict.fromkeys(point.mixer for point in points))
    others = [mixer for mixer in mixers if mixer not in STYLES]
    return {
        mixer: STYLES.get(mixer) or OTHERS[others.index(mixer) % len(OTHERS)] for mixer in mixers
    }


def _byte_ticks(axes: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    candidates = [mantissa * 10**power for power in range(13) for mantissa in (1, 2, 5)]
    ticks = [x for x in candidates if low <= x <= high]
    if len(ticks) > 8:
        ticks = [x for x in ticks if str(x).startswith("1")]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bytes_text(float(x))))


def bytes_text(count: float | int) -> str:
    """5000 -> "5 kB" (a kilobyte is 1000 bytes)."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} B"


def _place_labels(axes: Any, texts: Sequence[Label]) -> None:
    """Puts each label beside its point, where it covers least: no marker, no line and no other label if possible."""
    figure = axes.figure
    figure.draw_without_rendering()  # settles the layout, so that boxes in pixels mean something
    renderer = figure.canvas.get_renderer()
    unit = figure.dpi / 72
    taken = [box for line in axes.lines for box in _boxes_along(axes, line, unit)]
    frame = axes.get_window_extent(renderer)
    for x, y, text, colour, is_name in texts:
        best, best_cost = None, float("inf")
        for rank, (dx, dy, ha, va) in enumerate(_PLACES):
            label = axes.annotate(
                text,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=10.5 if is_name else 8.5,
                fontweight="bold" if is_name else "normal",
                color=colour,
                zorder=4,
            )
            box = label.get_window_extent(renderer)
            outside = not (
                frame.x0 <= box.x0
                and box.x1 <= frame.x1 + 4 * unit
                and frame.y0 <= box.y0
                and box.y1 <= frame.y1
            )
            covered = sum(weight for other, weight in taken if box.overlaps(other))
            cost = covered + 30 * outside + rank / 20
            if cost < best_cost:
                if best is not None:
                    best[0].remove()
                best, best_cost = (label, (box.padded(unit), 8)), cost
            else:
                label.remove()
        if best is not None:
            taken.append(best[1])


def _boxes_along(axes: Any, line: Any, unit: float | int) -> list[Any]:
    """What a curve covers, in pixels, and how bad it is to cover that: a box per marker, small boxes along the line."""
    from matplotlib.transforms import Bbox

    places = [tuple(xy) for xy in axes.transData.transform(line.get_xydata())]
    boxes = [(Bbox.from_extents(x, y, x, y).padded(4 * unit), 4) for x, y in places]
    for (x0, y0), (x1, y1) in itertools.pairwise(places):
        steps = max(int(max(abs(x1 - x0), abs(y1 - y0)) / (5 * unit)), 1)
        for i in range(1, steps):
            x, y = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
            boxes.append((Bbox.from_extents(x, y, x, y).padded(unit), 0.5))
    return boxes


# Offsets in points from a marker, and the side of the text that is anchored there, in order of preference.
_PLACES: tuple[tuple[float, float, str, str], ...] = (
    (8, 0, "left", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (-8, 0, "right", "center"),
    (6, 6, "left", "bottom"),
    (6, -6, "left", "top"),
    (-6, 6, "right", "bottom"),
    (-6, -6, "right", "top"),
    (0, 19, "center", "bottom"),
    (0, -19, "center", "top"),
    (8, 13, "left", "bottom"),
    (8, -13, "left", "top"),
    (-8, 13, "right", "bottom"),
    (-8, -13, "right", "top"),
    (0, 31, "center", "bottom"),
    (0, -31, "center", "top"),
)


def _curves(
    runs: dict[str, list[dict[str, Any]]], ending: str
) -> dict[str, tuple[list[int], list[Any]]]:
    """name -> (steps, values) of each run's metrics with that last word; train and eval are told apart in the name."""
    curves: dict[str, tuple[list[int], list[Any]]] = {}
    for run, records in runs.items():
        keys = dict.fromkeys(key for record in records for key in record)
        keys = [key for key in keys if key.split("/")[-1] == ending]
        if (
            len(runs) > 1 and keys
        ):  # one curve per run: the evaluation's where there is more than one
            many = [key for key in keys if sum(key in record for record in records) > 1]
            keys = sorted(many or keys, key=lambda key: not key.startswith("eval"))[:1]
        for key in keys:
            pairs = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if pairs:
                steps, values = zip(*pairs)
                curves[run if len(runs) > 1 else key] = (list(steps), list(values))
    return curves


def _run_colour(run: Path) -> str | None:
    """The colour of the run's mixer, so that both pictures speak of it in one colour."""
    config = read_json(run / "config.json")
    style = STYLES.get(mixer_of(config["model"])) if config else None
    return style and style[0]


def _label_ends(axes: Any, ends: Sequence[tuple[float | int, str, str]]) -> None:
    """Names at the right end of their curves, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    ends = sorted(ends)
    for at, (_, name, colour) in zip(spread([e[0] for e in ends], (high - low) * 0.055, low), ends):
        axes.annotate(
            name,
            (1.01, at),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
        )


def spread(values: Sequence[float | int], gap: float | int, low: float | int) -> list[float]:
    """The places closest to ascending `values` (least squares) that are at least `gap` apart and none below `low`.

    With the gaps taken out, that is the closest ascending sequence: neighbours that are out of order share their mean.
    """
    groups: list[list[float]] = []  # [sum, count]
    for i, value in enumerate(values):
        groups.append([value - i * gap, 1.0])
        while len(groups) > 1 and groups[-2][0] * groups[-1][1] >= groups[-1][0] * groups[-2][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    means = [max(total / count, low) for total, count in groups for _ in range(round(count))]
    return [mean + i * gap for i, mean in enumerate(means)]


def _join(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(part, facecolor="white")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
