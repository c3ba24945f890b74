"""Draw the recall-memory figure of a suite, or of any directory of finished runs, again.

    python -m eval plot runs/demo [--out FILE.png|.pdf|.svg]

Reads the config.json and summary.json of the runs in the directory; nothing is trained or evaluated.
"""

import argparse
from pathlib import Path

from train.errors import UserError
from train.plots import recall_memory
from train.points import read_points

FORMATS = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workdir", type=Path, help="the --workdir of a suite, or the parent of several runs"
    )
    parser.add_argument(
        "--out", type=Path, help="file to write (default: WORKDIR/plots/recall_memory.png)"
    )


def run(args: argparse.Namespace) -> None:
    out = args.out or args.workdir / "plots" / "recall_memory.png"
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out} must end in one of {', '.join(FORMATS)}")
    print(recall_memory(read_points(args.workdir), out))
