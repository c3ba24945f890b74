"""The pictures of a run or a suite: recall against memory, accuracy against width, and learning curves.

Labels stand beside what they name instead of in a legend; colours are a palette that colour-blind readers can tell apart
(Okabe and Ito), and every mixer has a marker of its own besides. Files are written whole or not at all.
"""

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train import published as papers
from train.logs import read_metrics
from train.plot_labels import Label, label_ends, place_labels
from train.points import (
    Point,
    claim,
    describe,
    detail_labels,
    display_name,
    mixer_of,
    read_json,
    segment_of,
    segment_text,
)
from train.published import RecallPoint, WidthPoint

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


def recall_memory(
    points: Sequence[Point],
    path: str | Path,
    published: Sequence[RecallPoint] = (),
) -> Path | None:
    """Recall (accuracy) against state bytes per sequence, log x. The title is the claim that the points support.

    published: drawn as hollow marks, where one of the points is of the same mixer. None where there is no point.
    """
    if not points:
        return None
    figure, axes = canvas((7.2, 4.6))
    details = detail_labels(points)
    axes.set_xscale("log")
    texts: list[Label] = []
    styles = _styles(points)
    published = [p for p in published if p.mixer in styles]
    for p in published:
        _hollow(axes, [p.state_bytes], [p.accuracy], styles[p.mixer], p.approximate)
    for mixer, (colour, marker) in styles.items():
        mine = sorted((p for p in points if p.mixer == mixer), key=lambda p: p.state_bytes)
        xs, ys = [p.state_bytes for p in mine], [p.accuracy for p in mine]
        axes.plot(xs, ys, color=colour, lw=1.6, alpha=0.55, zorder=3)
        axes.scatter(xs, ys, color=colour, marker=marker, s=52, zorder=4, edgecolor="white", lw=0.8)
        named, *rest = sorted(mine, key=lambda p: (-p.accuracy, p.state_bytes))
        also = tuple((p.state_bytes, p.accuracy) for p in rest[:6])
        x, y = named.state_bytes, named.accuracy
        texts.append(Label(x, y, display_name(mixer), colour, True, also))
        texts += [
            Label(p.state_bytes, p.accuracy, details[p.name], colour, False)
            for p in mine
            if details[p.name]
        ]
    sizes = [p.state_bytes for p in (*points, *published)]
    axes.set_xlim(max(min(sizes), 1) / 1.9, max(sizes) * 2.6)
    axes.set_ylim(-0.06, 1.1)
    _byte_ticks(axes)
    _accuracy_ticks(axes)
    axes.set_xlabel("state per sequence while decoding")
    hollow = "hollow: published" if published else ""
    _title(axes, claim(points), _join("recall accuracy", describe(points), hollow))
    place_labels(axes, sorted(texts, key=lambda t: not t.is_name))
    return save(figure, Path(path))


def based_fig2(points: Sequence[Point], path: str | Path) -> Path | None:
    """`recall_memory` with the points of BASED's figure 2, for runs of its mix of segments."""
    return recall_memory(points, path, papers.RECALL_MEMORY)


def accuracy_width(
    points: Sequence[Point],
    path: str | Path,
    published: Sequence[WidthPoint] = (),
) -> Path | None:
    """Accuracy against d_model, log2 x: a panel for each test (length and pairs), a line for each mixer through its best.

    published: drawn dashed with hollow marks, for the mixers and lengths that the points have. None where no point is.
    """
    points = [point for point in points if "d" in point.detail]
    if not points:
        return None
    tests = sorted({segment_of(point) for point in points})
    columns = 2 if len(tests) == 4 else min(len(tests), 3)
    rows = -(-len(tests) // columns)
    size = (max(4.6 * columns, 7.2), 3.4 * rows + 1)
    figure, grid = canvas(size, columns, rows)
    styles = _styles(points)
    panels = list(np.ravel(grid))
    for axes in panels[len(tests) :]:
        axes.set_visible(False)
    texts: list[list[Label]] = []
    for axes, test in zip(panels, tests):
        here = [point for point in points if segment_of(point) == test]
        texts.append(
            _width_panel(axes, here, styles, [p for p in published if p.length == test[0]])
        )
        if len(tests) > 1:
            axes.set_title(segment_text(test), loc="left", fontsize=10, color=GREY)
    drawn = [p for p in published if p.mixer in styles and p.length in {test[0] for test in tests}]
    hollow = "hollow, dashed: published" if drawn else ""
    subtitle = _join("recall accuracy", describe(points, width=False), hollow)
    _figure_title(figure, claim(points, "width"), subtitle)
    for axes, labels in zip(panels, texts):
        place_labels(axes, labels)
    return save(figure, Path(path))


def _width_panel(
    axes: Any,
    points: Sequence[Point],
    styles: dict[str, tuple[str, str]],
    published: Sequence[WidthPoint],
) -> list[Label]:
    """Draws the lines of one panel and returns the names that belong beside them."""
    axes.set_xscale("log", base=2)
    labels, widths = [], {int(p.detail["d"]) for p in points}
    for mixer, (colour, marker) in styles.items():
        best: dict[int, float] = {}
        for point in (p for p in points if p.mixer == mixer):
            d = int(point.detail["d"])
            best[d] = max(float(point.accuracy), best.get(d, 0.0))
        line = sorted(best.items())
        if not line:
            continue
        theirs = [p for p in published if p.mixer == mixer]
        if theirs:
            xs, ys = [p.d_model for p in theirs], [p.accuracy for p in theirs]
            axes.plot(xs, ys, color=colour, lw=1, ls=(0, (4, 3)), alpha=0.45, zorder=2)
            widths |= set(xs)
        for p in theirs:
            _hollow(axes, [p.d_model], [p.accuracy], (colour, marker), p.approximate)
        xs, ys = [x for x, _ in line], [y for _, y in line]
        axes.plot(xs, ys, color=colour, lw=1.6, alpha=0.7, zorder=3)
        axes.scatter(xs, ys, color=colour, marker=marker, s=46, zorder=4, edgecolor="white", lw=0.8)
        *others, last = line
        labels.append(Label(*last, display_name(mixer), colour, True, tuple(reversed(others))))
    ticks = sorted(widths)
    axes.set_xticks(ticks, [str(d) for d in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0] / 1.5, ticks[-1] * 1.5)
    axes.set_ylim(-0.06, 1.14)
    _accuracy_ticks(axes)
    axes.set_xlabel("width of the model")
    return labels


def zoology_fig2(points: Sequence[Point], path: str | Path) -> Path | None:
    """`accuracy_width` with the points of Zoology's figure 2, for runs of its lengths."""
    return accuracy_width(points, path, papers.ACCURACY_WIDTH)


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
    figure, all_axes = canvas((5.4 * len(panels), 3.8), len(panels))
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
        label_ends(axes, ends)
    return save(figure, Path(path or workdir / "plots" / "learning_curves.png"))


def canvas(size: tuple[float, float], columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure that belongs to no window and no global state, with a light grid and no frame; its axes, or an array."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(rows, columns)
    for axes in np.ravel(all_axes):
        axes.grid(True, color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b0b0b0")
        axes.tick_params(colors=GREY, labelsize=9, which="both")
        axes.xaxis.label.set_color(GREY)
    return figure, all_axes


def _hollow(
    axes: Any, xs: list[int], ys: list[float | int], style: tuple[str, str], approximate: bool
) -> None:
    """Published points: the outline of the mixer's mark, fainter where the paper's figure hides the place."""
    colour, marker = style
    axes.plot(
        xs,
        ys,
        ls="None",
        marker=marker,
        ms=6.5,
        mfc="none",
        mec=colour,
        mew=1.1,
        alpha=0.45 if approximate else 0.8,
        zorder=2.5,
    )


def _accuracy_ticks(axes: Any) -> None:
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])


def _title(axes: Any, text: str, subtitle: str) -> None:
    title, pad = textwrap.fill(text, 62), 26 + 13 * subtitle.count("\n")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=pad)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=9.5, color=GREY, va="bottom")


def _figure_title(figure: Any, text: str, subtitle: str) -> None:
    """`_title` over several panels. A line that is not drawn keeps the place for the subtitle."""
    title = textwrap.fill(text, int(figure.get_figwidth() * 8.6))
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent().transformed(figure.transFigure.inverted())
    figure.text(0.01, box.y0, subtitle, fontsize=9.5, color=GREY, va="bottom")


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


def _join(*parts: str) -> str:
    """The parts with dots between, broken where a line would pass 96 letters."""
    lines: list[str] = []
    for part in filter(None, parts):
        if lines and len(lines[-1]) + len(part) < 93:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


def save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(part, facecolor="white")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


# What config.plot names. A figure takes the points and the file to write; None where the points have nothing to show.
PLOTS: Mapping[str, Callable[[Sequence[Point], Path], Path | None]] = {
    "recall_memory": recall_memory,
    "based_fig2": based_fig2,
    "accuracy_width": accuracy_width,
    "zoology_fig2": zoology_fig2,
}
