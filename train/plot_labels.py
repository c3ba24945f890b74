"""Texts beside points and at the ends of curves, placed so that they cover each other and the data as little as possible."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

MARKER, TEXT = 4.0, 8.0  # how bad it is to cover a marker or a text; a piece of a line is .5
HOLLOW = 2.5  # a marker in the background


class Label(NamedTuple):
    """A text to stand beside a point: the name of a mixer (large), or what sets the point apart from its siblings.

    also: other points that the text may stand beside instead, the less preferred the later.
    """

    x: int | float
    y: int | float
    text: str
    colour: str
    is_name: bool
    also: tuple[tuple[int | float, int | float], ...] = ()


def place_labels(axes: Any, texts: Sequence[Label]) -> None:
    """Puts each label, in turn, where it covers least: no marker, no line and no other label if possible.

    A name is always drawn. A detail that would cover a marker, leave the frame or touch another label is left out: on a
    panel of sixty points the rest can be read that way.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # settles the layout, so that boxes in pixels mean something
    renderer = figure.canvas.get_renderer()
    unit = figure.dpi / 72
    boxes, weights = _obstacles(axes, unit)
    frame = axes.get_window_extent(renderer).extents
    frame = frame + np.array([0, 0, 4 * unit, 0])  # a text may lean out to the right a little
    crowd = (
        len(texts) > 12
    )  # then a detail must stand so close to its point that nobody takes it for another's
    for label in texts:
        places = _PLACES[:8] if crowd and not label.is_name else _PLACES
        anchors = [(label.x, label.y), *label.also]
        artist = axes.annotate(
            label.text,
            anchors[0],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=10.5 if label.is_name else 8.5,
            fontweight="bold" if label.is_name else "normal",
            color=label.colour,
            zorder=5,
        )
        extent = artist.get_window_extent(renderer)
        size = np.array([extent.width, extent.height])
        best, best_cost, best_box, hides = None, np.inf, np.zeros(4), False
        for i, anchor in enumerate(anchors):
            at = axes.transData.transform(anchor)
            for rank, place in enumerate(places):
                box = _box(at, size, place, unit)
                hit = weights[_overlaps(box, boxes)]
                outside = bool(np.any(box[:2] < frame[:2]) or np.any(box[2:] > frame[2:]))
                cost = hit.sum() + 30 * outside + rank / 20 + 1.5 * (rank >= 8) + i / 2
                if cost < best_cost:
                    best, best_cost, best_box = (anchor, place), cost, box
                    worst = hit.sum() if crowd else hit.max(initial=0)
                    hides = outside or worst >= MARKER
        if best is None or (hides and not label.is_name):
            artist.remove()
            continue
        artist.xy, (dx, dy, ha, va) = best
        artist.set(position=(dx, dy), ha=ha, va=va)
        boxes = np.vstack([boxes, best_box + unit * np.array([-3, -1, 3, 1])])
        weights = np.append(weights, TEXT)


def _box(
    at: Float[np.ndarray, "2"],
    size: Float[np.ndarray, "2"],
    place: tuple[float | int, float | int, str, str],
    unit: float | int,
) -> Float[np.ndarray, "4"]:
    """Left, bottom, right and top in pixels of a text of that size beside the point."""
    dx, dy, ha, va = place
    share = np.array([_SHARE[ha], _SHARE[va]])
    low = at + unit * np.array([dx, dy]) - share * size
    return np.concatenate([low, low + size])


def _overlaps(box: Float[np.ndarray, "4"], boxes: Float[np.ndarray, "n 4"]) -> Any:
    return np.all((box[:2] < boxes[:, 2:]) & (boxes[:, :2] < box[2:]), axis=1)


def _obstacles(
    axes: Any, unit: float | int
) -> tuple[Float[np.ndarray, "n 4"], Float[np.ndarray, "n"]]:
    """What the curves cover, in pixels, and how bad it is to cover that: markers, and small boxes along the lines."""
    centres, sizes, weights = [], [], []
    for line in axes.lines:
        places = axes.transData.transform(line.get_xydata())
        hollow = line.get_markerfacecolor() == "none"
        centres += list(places)
        sizes += [4 * unit] * len(places)
        weights += [HOLLOW if hollow else MARKER] * len(places)
        if line.get_linestyle() == "None":
            continue
        for start, end in itertools.pairwise(places):
            steps = max(int(np.abs(end - start).max() / (5 * unit)), 1)
            between = [start + (end - start) * i / steps for i in range(1, steps)]
            centres += between
            sizes += [unit] * len(between)
            weights += [0.5] * len(between)
    middle, size = np.reshape(centres, (-1, 2)), np.reshape(sizes, (-1, 1))
    return np.hstack([middle - size, middle + size]), np.array(weights, float)


_SHARE = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}
# Offsets in points from a marker, and the side of the text that is anchored there, in order of preference.
_PLACES: tuple[tuple[float | int, float | int, str, str], ...] = (
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


def label_ends(axes: Any, ends: Sequence[tuple[float | int, str, str]]) -> None:
    """Names, (value, name, colour) each, at the right end of their curves, moved apart where they would cover each other."""
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
