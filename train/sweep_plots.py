"""The picture of a sweep's learning rates: which rate is best for each run, and how much the seeds differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from train.plot_labels import label_ends
from train.plots import PALETTE, STYLES, _join, _title, canvas, save
from train.sweep_results import Rate, best_rate


def learning_rates(
    statistics: Mapping[str, Sequence[Rate]],
    path: str | Path,
    mixers: Mapping[str, str] | None = None,
) -> Path | None:
    """The metric against the learning rate, log x: a line per run through the means over seeds, a band from the lowest to
    the highest of them, a ring around the best. None where no run has two learning rates.

    statistics: see train.sweep_results.statistics. mixers: run -> mixer, whose colour a run takes if it is its only one.
    """
    runs = {run: list(rates) for run, rates in statistics.items() if len(rates) > 1}
    if not runs:
        return None
    metric = next(iter(runs.values()))[0].metric
    runs = {run: rates for run, rates in runs.items() if rates[0].metric == metric}
    figure, axes = canvas((7.2, 4.6))
    axes.set_xscale("log")
    best = {run: best_rate(rates) for run, rates in runs.items()}
    ends = []
    for (run, rates), colour in zip(runs.items(), _colours(list(runs), mixers or {})):
        xs = [rate.learning_rate for rate in rates]
        axes.plot(
            xs, [rate.mean for rate in rates], color=colour, lw=1.6, marker="o", ms=4, zorder=3
        )
        low, high = [rate.lowest for rate in rates], [rate.highest for rate in rates]
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0, zorder=2)
        ring = {"marker": "o", "ms": 9, "mfc": "none", "mec": colour, "mew": 1.4, "zorder": 4}
        axes.plot([best[run].learning_rate], [best[run].mean], **ring)
        ends.append((rates[-1].mean, run, colour))
    if metric.endswith("accuracy"):
        axes.set_ylim(-0.03, 1.06)
    axes.set_xlabel("peak learning rate")
    seeds = max(rate.seeds for rates in runs.values() for rate in rates)
    band = (
        f"mean of {seeds} seeds, band from the lowest to the highest" if seeds > 1 else "one seed"
    )
    _title(axes, _claim(best), _join(metric.removeprefix("eval/"), band, "ring: the best"))
    label_ends(axes, ends)
    return save(figure, Path(path))


def _claim(best: Mapping[str, Rate]) -> str:
    """The sentence that the rings add up to."""
    rates = sorted({b.learning_rate for b in best.values()})
    if len(rates) == 1:
        return f"A learning rate of {rates[0]:g} is best" + (" for every run" * (len(best) > 1))
    return f"The best learning rate lies between {rates[0]:g} and {rates[-1]:g}"


def _colours(runs: Sequence[str], mixers: Mapping[str, str]) -> list[str]:
    of_mixers = [mixers.get(run, "") for run in runs]
    if all(mixer in STYLES and of_mixers.count(mixer) == 1 for mixer in of_mixers):
        return [STYLES[mixer][0] for mixer in of_mixers]
    return [PALETTE[i % len(PALETTE)] for i in range(len(runs))]
