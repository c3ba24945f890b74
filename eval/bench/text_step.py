"""The training step of configs/text/small, hybrid and Transformer, beside a PyTorch model of the same shape (text_peer.py).

    python -m eval.bench.text_step --variant hybrid

is our side of the comparison (worker.py): it compiles, says what it is, and answers {"calls": n, "steps": k} with the
seconds per step of n calls of k steps each. Both sides step on random tokens that are ready before the clock starts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from eval.bench.compare import pool, ratios
from eval.bench.tables import with_quartiles
from eval.bench.timing import machine
from eval.bench.train_step import Setup, Steps
from eval.bench.worker import Worker, serve
from train.config_files import load_config
from train.errors import UserError
from train.loop import build_model
from train.sharding import make_mesh
from train.state import count_parameters
from train.step import make_training
from train.tasks import text
from train.tasks.task import FOREVER, Task

VARIANTS = ("hybrid", "transformer")
PEER = Path(__file__).with_name("text_peer.py")
PEER_STEPS, SINGLE_CALLS, SEVERAL_CALLS = 6, 6, 2  # in one turn
MODEL_KEYS = ("vocab_size", "d_model", "num_layers", "channel_multiplier")


def variant_config(variant: str) -> ConfigDict:
    """configs/text/small, without an end."""
    config = load_config(f"text/small:{variant}")
    config.steps = 2**30
    return config


def set_up(config: ConfigDict) -> Setup:
    """Model and step of a text config on random tokens, through the same functions as `python -m train`."""
    length, batch_size = int(config.data.length), int(config.batch_size)
    rng = np.random.default_rng(0)
    shape = (config.steps_per_call, batch_size, length + 1)
    rows = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    task = Task(
        name="random text",
        batch_size=batch_size,
        sample_tokens=(1, 16),
        tokens_per_step=lambda program: batch_size * length,
        program_at=lambda step: (None, FOREVER),
        inputs=lambda first, count: {"rows": rows},
        batch=text.make_batch,
        loss=text.loss,
        evaluate=lambda model, params: {},
        best=("eval/loss", "min"),
        state_length=length,
    )
    model = build_model(config)
    return Setup(config, task, model, make_training(config, model, task, make_mesh(config)))


def compare_text(
    variant: str,
    peer_python: Path | None,
    rounds: int,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """One row: spreads of ours in calls of 1 and of steps_per_call steps, of the peer's, and the ratios of medians.

    Raises:
      UserError: the peer fails, or is another model.
    """
    config = variant_config(variant)
    with ExitStack() as stack:
        tick(f"text, {variant}: compiling")
        command = [sys.executable, "-m", "eval.bench.text_step", "--variant", variant]
        ours = stack.enter_context(Worker("jaxmodels", command))
        theirs = None
        if peer_python:
            tick(f"text, {variant}: warming up the peer")
            theirs = stack.enter_context(Worker("torch", peer_command(config, peer_python)))
            if theirs.ready["parameters"] != ours.ready["parameters"]:
                raise UserError(
                    f"the peer has {theirs.ready['parameters']} parameters and ours {ours.ready['parameters']}"
                )
        taken: dict[str, list[dict]] = {"single": [], "several": [], "peer": []}
        for turn in range(rounds):
            tick(f"text, {variant}: round {turn + 1} of {rounds}")
            taken["single"].append(ours.ask(calls=SINGLE_CALLS, steps=1))
            taken["several"].append(ours.ask(calls=SEVERAL_CALLS, steps=8))
            if theirs:
                taken["peer"].append(theirs.ask(steps=PEER_STEPS))
        times = {side: pool(turns) for side, turns in taken.items() if turns}
        return {
            "variant": variant,
            "length": int(config.data.length),
            "batch": int(config.batch_size),
            "ours": ours.ready,
            "peer": theirs.ready if theirs else None,
            "times": times,
            "ratio": ratios(times),
        }


def peer_command(config: ConfigDict, python: Path) -> list[str | Path]:
    """How the peer is started for the model of a config."""
    model = {key: config.model[key] for key in MODEL_KEYS}
    model["mixers"] = [dict(mixer) for mixer in config.model.mixers]
    size = ["--length", str(config.data.length), "--batch", str(config.batch_size)]
    return [python, "-P", PEER, "--model", json.dumps(model), *size, "--serve"]


def text_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per model; tokens per second of the faster way of ours."""
    table = Table(title="Text training step, ms: median (quartiles)", title_justify="left")
    for column in ("model", "length x batch", "1 a call", "8 a call", "tokens/s", "torch", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        times, ratio = row["times"], row["ratio"]
        tokens = row["length"] * row["batch"] / times["several"]["seconds"]["median"]
        cells = [row["variant"], f"{row['length']} x {row['batch']}"]
        cells += [with_quartiles(times[side]["seconds"]) for side in ("single", "several")]
        cells += [f"{tokens:,.0f}"]
        if ratio:
            cells += [with_quartiles(times["peer"]["seconds"])]
            cells += [f"{ratio['several']['seconds']:.2f}x ({ratio['single']['seconds']:.2f}x)"]
        table.add_row(*cells)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Our side of the text benchmark.")
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    steps = Steps(set_up(variant_config(parser.parse_args(arguments).variant)))
    steps.time_calls(calls=2, steps=1)  # compiles; every number of steps runs through one program
    leaves = jax.tree.leaves(steps.state.params)
    ready = {
        "side": "jaxmodels",
        "parameters": count_parameters(steps.state.params),
        "dtype": str(leaves[0].dtype),
        "machine": machine(),
    }
    serve(ready, lambda **request: steps.time_calls(**request))


if __name__ == "__main__":
    main()
