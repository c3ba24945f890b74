"""Measure how the error of a linear-attention op grows with the length, against float64.

    python -m eval drift [--length 131072] [--out docs/figures/drift.png] [--json FILE]

One head of BASED on random data (f = 16, v = 64, q, k, v normal). At each power of two the error of the outputs of the
last octave, root mean square over that of the exact outputs there: an error that piles up in the state shows as a curve that rises.
float64 is the same chunked form in float64, which the tests hold against the token-by-token definition to 1e-10.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from train.errors import UserError

DTYPES = ("float32", "bfloat16")
SHORTEST = 1024
# What an octave's error may be: rounding of the inputs' own precision, with room for the terms of a chunk.
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the task."""
    parser.add_argument("--length", type=int, default=131072, help="tokens, a power of two")
    parser.add_argument("--implementation", default="chunked", help="the form of the op to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also draw the curves to this file")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")


def run(args: argparse.Namespace) -> int:
    """Prints a table; exit code 1 where an error passes its bound.

    Raises:
      UserError: a length that is no power of two from 1,024 on.
    """
    if args.length < SHORTEST or args.length & (args.length - 1):
        raise UserError(f"--length must be a power of two from {SHORTEST} on, got {args.length}")
    result = measure(args.length, args.implementation, args.seed)
    print_table(result)
    if args.out:
        print(draw(result, args.out))
    if args.json:
        from train.run_directory import write_atomically

        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    worst = {dtype: max(errors) for dtype, errors in result["errors"].items()}
    return int(any(worst[dtype] > BOUNDS[dtype] for dtype in worst))


def measure(length: int, implementation: str, seed: int) -> dict[str, Any]:
    """{"lengths": [1024, 2048, ...], "errors": {"float32": [...], "bfloat16": [...]}, "bounds": ...}."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.based import based
    from train.session import versions

    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=(1, length, 1, width)) for width in (16, 16, 64)]
    lengths = [SHORTEST << i for i in range((length // SHORTEST).bit_length())]
    errors: dict[str, list[float]] = {}
    for dtype in DTYPES:
        given = [jnp.asarray(x, dtype) for x in drawn]
        form = jax.jit(lambda q, k, v: based(q, k, v, implementation=implementation)[0])
        found = np.asarray(form(*given), np.float64)
        with jax.enable_x64(True):
            same = [jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in given]
            exact = jax.jit(lambda q, k, v: based(q, k, v, implementation="chunked")[0])(*same)
            exact = np.asarray(exact)
        octaves = [(n // 2 if n > SHORTEST else 0, n) for n in lengths]
        errors[dtype] = [
            float(np.sqrt(np.mean((found - exact)[:, a:b] ** 2) / np.mean(exact[:, a:b] ** 2)))
            for a, b in octaves
        ]
    return {
        "implementation": implementation,
        "lengths": lengths,
        "errors": errors,
        "bounds": BOUNDS,
        "versions": versions(),
    }


def print_table(result: dict[str, Any]) -> None:
    """One line per length, one column per dtype."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for title in ("up to token", *result["errors"]):
        table.add_column(title, justify="right")
    for i, length in enumerate(result["lengths"]):
        table.add_row(f"{length:,}", *(f"{e[i]:.2e}" for e in result["errors"].values()))
    table.add_row("bound", *(f"{result['bounds'][dtype]:.0e}" for dtype in result["errors"]))
    Console(width=None).print(table)


def draw(result: dict[str, Any], path: Path) -> Path:
    """Error against length, both logarithmic, with the bounds dashed."""
    from train.plots import PALETTE, canvas, save

    figure, axes = canvas((6.4, 3.8))
    for colour, (dtype, errors) in zip(PALETTE, result["errors"].items()):
        axes.plot(result["lengths"], errors, color=colour, marker="o", lw=1.6, label=dtype)
        axes.axhline(result["bounds"][dtype], color=colour, ls="--", lw=1)
        axes.annotate(
            dtype,
            (result["lengths"][-1], errors[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(result["lengths"][0] / 1.3, result["lengths"][-1] * 2.6)
    axes.set_xlabel("token")
    axes.set_title("Error of BASED against float64", loc="left", fontsize=12, fontweight="bold")
    return save(figure, path)
