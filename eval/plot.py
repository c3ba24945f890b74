"""Draw the figure of a suite, a sweep, or any directory of finished runs, again.

    python -m eval plot runs/demo [--figure recall_memory|based_fig2|zoology_fig2] [--out FILE.png|.pdf|.svg]

Reads the config.json and summary.json of the runs in the directory; nothing is trained or evaluated. Of a sweep the best
learning rate of each run is drawn. based_fig2 and zoology_fig2 add the published points as hollow marks.
"""

import argparse
from pathlib import Path

from train.errors import UserError
from train.plots import PLOTS
from train.points import read_points
from train.sweep_results import read_best_points

FORMATS = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workdir", type=Path, help="the --workdir of a suite, or the parent of several runs"
    )
    parser.add_argument(
        "--figure", choices=sorted(PLOTS), default="recall_memory", help="what to draw"
    )
    parser.add_argument(
        "--out", type=Path, help="file to write (default: WORKDIR/plots/FIGURE.png)"
    )


def run(args: argparse.Namespace) -> None:
    """Draws one figure and prints where it is.

    Raises:
      UserError: a format that cannot be written, no finished run, nothing that the figure could show.
    """
    out = args.out or args.workdir / "plots" / f"{args.figure}.png"
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out} must end in one of {', '.join(FORMATS)}")
    is_sweep = (args.workdir / "best.csv").is_file()
    points = read_best_points(args.workdir) if is_sweep else read_points(args.workdir)
    path = PLOTS[args.figure](points, out)
    if path is None:
        raise UserError(f"{args.workdir} holds no runs that {args.figure} could show")
    print(path)
