"""The command behind `python -m eval bench`: what to measure, in which order, and where the numbers go."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.bench import LENGTHS, QUICK_LENGTHS
from eval.bench.compare import allocators, compare, parse_cases, parse_peer
from eval.bench.op_forms import Size
from eval.bench.ops import measure_op
from eval.bench.roofline import CALLS, estimates, roofline_table
from eval.bench.tables import defeats, findings, op_tables, parts_table, step_table
from eval.bench.text_input import measure_text_input, text_input_table
from eval.bench.text_step import VARIANTS, compare_text, text_table
from eval.bench.timing import machine
from train.errors import UserError
from train.run_directory import write_atomically


def run(args: argparse.Namespace) -> None:
    """Measures what `args` asks for, writes the JSON after every case, and prints the tables.

    Raises:
      UserError: an argument that cannot work (before anything is measured), or a peer that fails.
    """
    check(args)
    out, progress = Console(markup=False), Console(stderr=True, markup=False)
    if not out.is_terminal:
        out = Console(markup=False, width=120)  # a file or a pipe has no width to fit
    with_steps, ops, lengths = plan(args)
    cases, peer = (parse_cases(args), parse_peer(args)) if with_steps else ([], None)
    parts = ("train_step", "text_step", "text_input", "ops")
    results: dict[str, Any] = {"machine": machine(), **{part: [] for part in parts}}
    out.print(describe(results["machine"]), soft_wrap=True)

    def tick(what: str) -> None:
        if progress.is_terminal:
            status.update(what)
        else:
            progress.print(what)

    def save() -> None:
        if args.json:
            write_atomically(args.json, json.dumps(results, indent=1) + "\n")

    with progress.status("starting") as status:
        for case in cases:
            for name, environment in allocators(args.allocator):
                row = compare(
                    case, peer, args.rounds, args.steps_per_call, environment, args.breakdown, tick
                )
                results["train_step"].append({"allocator": name, **row})
                save()
        for variant in VARIANTS if args.text_step else ():
            results["text_step"].append(compare_text(variant, args.peer_python, args.rounds, tick))
            save()
        if args.text_input is not None:
            results["text_input"].append(measure_text_input(args.text_input, args.rounds, tick))
            save()
        for op in ops:
            size = Size(0, args.batch, args.heads, args.dtype, args.window)
            results["ops"].append(
                measure_op(op, lengths, args.repeats, args.memory, size, tick, args.peer_python)
            )
            save()
    if args.estimates:
        results["estimates"] = estimates(CALLS)
        save()
        out.print(roofline_table(results["estimates"]))
    if cases or ops:
        report(out, results["train_step"], results["ops"])
    if results["text_step"]:
        out.print(text_table(results["text_step"]))
    for result in results["text_input"]:
        out.print(text_input_table(result))
    if args.json:
        out.print(f"every number: {args.json}", soft_wrap=True)


def plan(args: argparse.Namespace) -> tuple[bool, list[str], Sequence[int]]:
    """(whether to measure training steps, which ops, at which lengths). Asked for nothing: a quick set of both."""
    text = args.text_step or args.text_input is not None
    asked = args.train_step or args.op or args.peer_python or args.zoology or text or args.estimates
    peer = args.zoology or (args.peer_python and not args.text_step and not args.op)
    with_steps = not asked or args.train_step or bool(peer)
    ops = args.op if asked else ["based"]
    return with_steps, ops, args.lengths or (LENGTHS if asked else QUICK_LENGTHS)


def check(args: argparse.Namespace) -> None:
    """UserError for numbers below what a measurement needs, and for a JSON file that could not be written at the end."""
    least = dict.fromkeys(("rounds", "steps_per_call", "repeats", "window", "batch", "heads"), 1)
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise UserError(f"--{name} must be at least {bound}, not {getattr(args, name)}")
    if args.memory <= 0:
        raise UserError(f"--memory must be positive, not {args.memory}")
    bad = [n for n in args.lengths or () if n < 1]
    if bad:
        raise UserError(f"--lengths are positive, not {bad[0]}")
    if args.json:
        check_writable(args.json)


def check_writable(path: Path) -> None:
    """UserError unless a file can be made at `path`."""
    if path.is_dir():
        raise UserError(f"--json {path} is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: {path.parent} cannot be written")


def describe(info: dict[str, Any]) -> str:
    """One line: device, processor, versions, and a warning if the machine is busy."""
    load, cores = info["load_average"], info["cores"]
    busy = load is not None and load > 0.5 * cores
    warning = f"\nload average {load:.1f} on {cores} cores: trust ratios, not times" if busy else ""
    versions = f"jax {info['jax']}, Python {info['python']}"
    return f"{info['device']}, {cores} cores of {info['processor']}, {versions}{warning}"


def report(out: Console, steps: Sequence[dict[str, Any]], ops: Sequence[dict[str, Any]]) -> None:
    """Tables, findings, and where others win."""
    say = lambda line: out.print(line, soft_wrap=True)
    if steps:
        out.print(step_table(steps))
        for line in remarks(steps):
            say(line)
    for row in steps:
        if "parts" in row:
            out.print(parts_table(row))
    for result in ops:
        for table in op_tables(result):
            out.print(table)
        for sentence in findings(result):
            say(f"  {sentence}")
    lost = defeats(steps, ops)
    say("where somebody else is faster:" if lost else "nobody else was faster in any case measured")
    for line in lost:
        say(f"  {line}")


def remarks(steps: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know about the two sides to read the table."""
    lines = []
    for row in (row for row in steps if row["peer"]):
        if not lines:
            versions, ours = row["peer"]["versions"], row["ours"]["machine"]
            lines.append(
                f"jax {ours['jax']} beside torch {versions['torch']} ({row['peer']['threads']} threads), both "
                f"{row['ours']['dtype']}. Ours generates its data inside the step, the peer's is ready before the clock "
                "starts. Processor time: the ratio of what all cores spent, one step a call."
            )
        mine, other = row["ours"]["parameters"], row["peer"]["parameters"]
        if mine != other:
            lines.append(f"{row['mixer']}: not the same model, {mine} parameters beside {other}")
    return lines
