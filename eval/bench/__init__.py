"""Measure training steps and ops, beside the PyTorch original when it is there.

    python -m eval bench                                                   a quick set, ours alone
    python -m eval bench --peer_python ~/torch311/bin/python --zoology ~/zoology --json steps.json
    python -m eval bench --text_step --peer_python ~/torch311/bin/python   the hybrid and the Transformer of configs/text/small
    taskset -c 0 python -m eval bench --text_input corpus.txt              tokenising, per core
    python -m eval bench --op based attention sliding_window long_conv --json ops.json
    python -m eval bench --sweep --mixers based --points 4 --json sweep.json

Training step: all of it, for two layers [base_conv k=3, mixer], d 64, vocabulary 8192, 4 labels per sequence, AdamW, no
dropout, float32. With --peer_python (Python 3.11 with torch 2.13, numpy, einops, pydantic, tqdm and pandas) and --zoology
(a checkout of HazyResearch/zoology) the original's step is measured too: two processes, both warm, that take turns.

Op: forward, forward with backward, and decoding, of every implementation and of a plain one written for this benchmark;
beside BASED also softmax attention, and with --peer_python a PyTorch form in linear time and, where it is installed there
and finds a GPU, flash-linear-attention's two. Each time with its share of the roofline.

Sweep: what a point of a grid of learning rates costs beside a single run, and the sweep beside its runs one by one.

Figures are medians with quartiles. On a CPU that others use at the same time only the ratios mean something.
"""

import argparse
from pathlib import Path

OPS = ("based", "linear_attention", "attention", "sliding_window", "long_conv")
QUICK_LENGTHS = (512, 1024, 2048, 4096)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train_step", action="store_true", help="measure training steps")
    parser.add_argument(
        "--text_step", action="store_true", help="measure the training steps of text/small"
    )
    parser.add_argument(
        "--text_input",
        metavar="PATH",
        help="measure tokenising and batches of a file or folder (PATH as config.data.path)",
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=[], help="measure these ops")
    parser.add_argument(
        "--estimates", action="store_true", help="print the rooflines of BASED's kernels, per chip"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here as well")
    steps = parser.add_argument_group("training steps")
    steps.add_argument("--mixers", nargs="+", default=["attention", "based"])
    steps.add_argument(
        "--shapes", nargs="+", default=["64x256", "256x64"], help="length x batch of a step"
    )
    steps.add_argument("--rounds", type=int, default=3, help="turns that each side takes")
    steps.add_argument("--steps_per_call", type=int, default=8, help="measured beside calls of 1")
    steps.add_argument("--peer_python", type=Path, help="an interpreter that has torch")
    steps.add_argument("--zoology", type=Path, help="a checkout of HazyResearch/zoology")
    steps.add_argument(
        "--allocator",
        choices=("default", "kept", "both"),
        default="default",
        help="kept: glibc is told, on both sides, not to give freed memory back to the system",
    )
    steps.add_argument("--breakdown", action="store_true", help="time the parts of our step too")
    sweeps = parser.add_argument_group(
        "sweeps (with --mixers, --shapes, --rounds, --steps_per_call)"
    )
    sweeps.add_argument("--sweep", action="store_true", help="measure a sweep, and nothing else")
    sweeps.add_argument("--points", type=int, default=4, help="learning rates of the sweep")
    sweeps.add_argument(
        "--sweep_steps",
        type=int,
        default=400,
        help="steps of the training commands; 0 leaves them out",
    )
    ops = parser.add_argument_group("ops")
    ops.add_argument("--lengths", nargs="+", type=int, help="sequence lengths")
    ops.add_argument("--repeats", type=int, default=9, help="measurements of each case")
    ops.add_argument("--window", type=int, default=64, help="keys that sliding_window sees")
    ops.add_argument("--batch", type=int, default=1, help="rows of each call")
    ops.add_argument("--heads", type=int, default=4)
    ops.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    ops.add_argument(
        "--memory", type=float, default=4.0, metavar="GiB", help="skip what needs more than this"
    )


def run(args: argparse.Namespace) -> None:
    if args.sweep:
        from eval.bench.sweep import run as measure  # imports jax; --help need not
    else:
        from eval.bench.measure import run as measure

    measure(args)
