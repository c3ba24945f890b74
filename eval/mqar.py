"""Measure the recall of a trained model on multi-query associative recall, segment by segment.

    python -m eval mqar --checkpoint runs/based [--segments 64:4,128:8] [--num_examples 1000] [--json FILE]

A segment is LENGTH:PAIRS. Without --segments the test segments of the run are taken, which gives its own numbers again.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import UserError

DEFAULT_EXAMPLES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the task."""
    parser.add_argument("--checkpoint", required=True, help="the --workdir of a training run")
    parser.add_argument("--segments", help="LENGTH:PAIRS,... (default: those of the run)")
    parser.add_argument(
        "--num_examples", type=int, help="examples per segment (default: those of the run, or 1000)"
    )
    parser.add_argument(
        "--step", default="best", help="best (default), latest, or the number of a step"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")


def run(args: argparse.Namespace) -> None:
    """Restores the model, evaluates it, prints a table and writes the JSON.

    Raises:
      UserError: a segment that cannot be, no run, no whole checkpoint, another task, a model that cannot take the length.
    """
    segments = args.segments and parse_segments(args.segments)
    if args.num_examples is not None and args.num_examples < 1:
        raise UserError(f"--num_examples must be at least 1, got {args.num_examples}")
    if args.step not in ("best", "latest") and not args.step.isdecimal():
        raise UserError(f"--step must be best, latest or a number, got {args.step!r}")

    from train.read_run import read_config

    config = read_config(args.checkpoint)
    if config.task != "mqar":
        raise UserError(f"{args.checkpoint} was trained on {config.task!r}, not on mqar")
    config.data.test = tuple(
        {
            **segment,
            "num_examples": args.num_examples or segment.get("num_examples") or DEFAULT_EXAMPLES,
        }
        for segment in segments or config.data.test
    )
    step = int(args.step) if args.step.isdecimal() else args.step
    try:
        result = evaluate(config, args.checkpoint, step)
    except UserError as error:
        if not segments:
            raise
        raise UserError(re.sub(r"config\.data\.test\[\d+\]", "--segments", str(error))) from error
    print_table(result)
    if args.json:
        from train.run_directory import write_atomically

        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")


def parse_segments(text: str) -> list[dict[str, Any]]:
    """Reads 64:4,128:8 as [{"length": 64, "num_kv_pairs": 4}, {"length": 128, "num_kv_pairs": 8}].

    Raises:
      UserError: not of that form. Whether a segment can be is for the task to say.
    """
    segments = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(\d+)\s*", part)
        if not match:
            raise UserError(
                f"--segments must be LENGTH:PAIRS,... like 64:4,128:8, got {part!r} in {text!r}"
            )
        segments.append({"length": int(match[1]), "num_kv_pairs": int(match[2])})
    return segments


def evaluate(config: Any, checkpoint: str | Path, step: int | str) -> dict[str, Any]:
    """The numbers of a checkpoint on config.data.test: {"checkpoint", "step", "accuracy", "loss", "segments": [...]}.

    Raises:
      UserError: as `run`.
    """
    import jax
    import jax.numpy as jnp

    from train.checkpoint import load_params
    from train.loop import build_model
    from train.tasks.mqar import segments_of
    from train.tasks.mqar_evaluation import make_evaluate, slice_name

    _, test = segments_of(config)
    model = build_model(config)
    zoology, cache = config.data.mode == "zoology", config.data.get("cache_dir", None)
    measure = make_evaluate(test, config.data.test_batch_size, zoology=zoology, cache_dir=cache)
    tokens = jnp.zeros((1, min(segment.length for segment in test)), jnp.int32)
    try:
        abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        restored = load_params(checkpoint, step, abstract)
        metrics = measure(model, restored.tree)
    except ValueError as error:  # a length that the model's positions or filters do not reach
        raise UserError(f"{checkpoint}: {str(error).splitlines()[0]}") from error
    return {
        "checkpoint": str(checkpoint),
        "step": restored.step,
        "accuracy": metrics["eval/accuracy"],
        "loss": metrics["eval/loss"],
        "segments": [
            {
                "length": segment.length,
                "num_kv_pairs": segment.num_kv_pairs,
                "num_examples": segment.num_examples,
                "accuracy": metrics[f"eval/accuracy/{slice_name(segment)}"],
                "loss": metrics[f"eval/loss/{slice_name(segment)}"],
            }
            for segment in test
        ],
    }


def print_table(result: Mapping[str, Any]) -> None:
    """One line per segment, and one for all examples together."""
    from rich.console import Console
    from rich.table import Table

    print(f"{result['checkpoint']}, step {result['step']}")
    table = Table(box=None, header_style="bold")
    for title in ("length", "pairs", "examples", "accuracy", "loss"):
        table.add_column(title, justify="right")
    total = sum(row["num_examples"] for row in result["segments"])
    everything = {"length": "all", "num_kv_pairs": "", "num_examples": total, **result}
    for row in [*result["segments"], *([everything] if len(result["segments"]) > 1 else [])]:
        table.add_row(
            *(str(row[key]) for key in ("length", "num_kv_pairs", "num_examples")),
            f"{row['accuracy']:.4f}",
            f"{row['loss']:.4f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
