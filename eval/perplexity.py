"""Measure how well a trained model predicts text: perplexity and bits per byte.

    python -m eval perplexity --checkpoint runs/text [--path FILE] [--length 1024] [--json FILE]

Without --path the text that the run held out is taken, which gives its own numbers again. --path takes what config.data.path
takes: a file, a folder, a glob, tfds:NAME. The text is cut into rows of --length tokens; a token is predicted from
what stands before it in its row and its document.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from train.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the task."""
    parser.add_argument("--checkpoint", required=True, help="the --workdir of a training run")
    parser.add_argument("--path", help="text to predict (default: what the run held out)")
    parser.add_argument("--length", type=int, help="tokens of a row (default: that of the run)")
    parser.add_argument("--batch_size", type=int, help="rows at a time (default: that of the run)")
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json instead of the one of the run"
    )
    parser.add_argument(
        "--step", default="best", help="best (default), latest, or the number of a step"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")


def run(args: argparse.Namespace) -> None:
    """Restores the model, reads the text, prints the numbers and writes the JSON.

    Raises:
      UserError: no run, no whole checkpoint, another task, text that cannot be read, a tokenizer of another vocabulary.
    """
    for name, least in (("length", 2), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")

    from eval.text_run import read_text_run

    text_run = read_text_run(args.checkpoint, args.step, args.tokenizer)
    result = {"checkpoint": args.checkpoint, "step": text_run.step} | measure(text_run, args)
    print(f"{args.checkpoint}, step {text_run.step}: {result['tokens']:,} tokens")
    for name in ("loss", "perplexity", "bits_per_byte"):
        if name in result:
            unit = " nats per token" if name == "loss" else ""
            print(f"  {name.replace('_', ' ')} {result[name]:.4f}{unit}")
    if args.json:
        from train.run_directory import write_atomically

        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")


def measure(text_run: Any, args: argparse.Namespace) -> dict[str, Any]:
    """{"path", "length", "tokens" (predicted), "loss", "perplexity", "bits_per_byte" where bytes are known}."""
    from rich.console import Console
    from rich.progress import Progress

    from train.config_paths import to_plain
    from train.data.text import held_out_rows
    from train.tasks.text import load_data
    from train.tasks.text_evaluation import make_evaluate

    config = text_run.config
    if args.path is not None:
        config.data.path, config.data.validation_path = args.path, args.path
    data = load_data(config, text_run.tokenizer)
    length = args.length or int(config.data.length)
    rows, _ = held_out_rows(data.held_out, length)
    batch_size = min(args.batch_size or int(config.data.test_batch_size), len(rows))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("predicting", total=len(rows))
        tick = lambda done: bar.update(task, completed=done)
        evaluate = make_evaluate(
            rows, batch_size, end=data.end, token_bytes=data.token_bytes, tick=tick
        )
        try:
            metrics = evaluate(text_run.model, text_run.params)
        except ValueError as error:  # a length that the model's positions or filters do not reach
            raise UserError(f"{args.checkpoint}: {str(error).splitlines()[0]}") from error
    return {
        "path": to_plain(config.data.validation_path or config.data.path),
        "length": length,
        "tokens": int((rows[:, 1:] >= 0).sum()),
        **{name.removeprefix("eval/"): value for name, value in metrics.items()},
    }
