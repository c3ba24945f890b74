"""The training step of the library, whole and in parts, for the model that the PyTorch original is measured with.

    python -m eval.bench.train_step --mixer based --length 64 --batch 256 --labels 4

is one side of a comparison (worker.py): it compiles, says what it is, and answers {"calls": n, "steps": k} with the
seconds per step of n calls of k steps each, and {"parts": n} with the spreads of n measurements of each part.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from eval.bench.timing import machine, seconds_of, take_turns
from eval.bench.worker import serve
from train.config import base_config
from train.config_paths import set_key
from train.cross_entropy import cross_entropy
from train.loop import build_model
from train.optimizer import make_optimizer
from train.sharding import make_mesh
from train.state import TrainState, count_parameters
from train.step import Training, make_training
from train.tasks import Task, build_task

FIELDS = {"attention": {"num_heads": 1}, "based": {"feature_dim": 16, "num_heads": 1}}


class Case(NamedTuple):
    """One row of the comparison."""

    mixer: str
    length: int
    batch: int
    labels: int = 4

    @property
    def shape(self) -> str:
        return f"{self.length}x{self.batch}"


class Setup(NamedTuple):
    """A case, ready to be compiled."""

    config: ConfigDict
    task: Task
    model: nn.Module
    training: Training


def case_config(case: Case, steps_per_call: int = 8) -> ConfigDict:
    """The run config of a case: what the original trains, at a constant rate, and nothing that stops or logs."""
    config = base_config()
    segment = {"length": case.length, "num_kv_pairs": case.labels}
    for key, value in {
        "steps": 2**30,
        "steps_per_call": steps_per_call,
        "batch_size": case.batch,
        "optimizer.schedule": "constant",
        "optimizer.weight_decay": 0.1,
        "model.mixers": [
            {"name": "base_conv", "kernel_size": 3},
            {"name": case.mixer, **FIELDS.get(case.mixer, {})},
        ],
        "model.embed_dropout": 0.0,
        "data.train": ({**segment, "num_examples": 100_000},),
        "data.test": ({**segment, "num_examples": case.batch},),
    }.items():
        set_key(config, key, value)
    return config


def set_up(case: Case) -> Setup:
    """Model, task and step of a case, through the same functions as `python -m train`."""
    config = case_config(case)
    task, model = build_task(config), build_model(config)
    return Setup(config, task, model, make_training(config, model, task, make_mesh(config)))


class Steps:
    """A train state that `time_calls` moves on."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.state: TrainState = setup.training.init()
        self.program, _ = setup.task.program_at(0)
        self.step = 0

    def call(self, count: int) -> Any:
        """One call of `count` steps; returns its report, which is on the device until somebody waits for it."""
        inputs = self.setup.task.inputs(self.step, count)
        self.state, report = self.setup.training.call(
            self.state, inputs, np.int32(count), np.bool_(True), program=self.program
        )
        self.step += count
        return report

    def time_calls(self, calls: int, steps: int) -> dict[str, list[float]]:
        """Per step, of each of `calls` calls of `steps` steps: seconds, dispatch and waiting included, and processor time."""
        pairs = [seconds_of(lambda: self.call(steps)) for _ in range(calls)]
        return {
            name: [x / steps for x in column]
            for name, column in zip(("seconds", "processor"), zip(*pairs))
        }


def parts(setup: Setup, params: Any) -> dict[str, Callable[[], Any]]:
    """The parts of a step, each a program of its own on arrays of the real shapes.

    Apart they cost more than inside the step, where XLA fuses them with their neighbours; the rest is what remains.
    """
    task, model = setup.task, setup.model
    program, _ = task.program_at(0)
    zero = jnp.zeros((), jnp.int32)
    make_batch = jax.jit(lambda step: task.batch(program, task.inputs(0, 1), step, zero))
    batch = make_batch(zero)
    tokens, labels = batch["tokens"], batch["labels"].reshape(-1)
    hidden = lambda p: model.apply({"params": p}, tokens, method="hidden")[0]
    cotangent = jnp.ones(jax.eval_shape(hidden, params).shape)
    rows = jnp.ones((labels.size, cotangent.shape[-1]))
    head = lambda p, r: model.apply({"params": p}, r, method="head")
    total = lambda p, r: cross_entropy(head, p, r, labels)[0]
    table = params["embed"]["embedding"]
    optimizer = make_optimizer(setup.config)
    opt_state = optimizer.init(params)

    def pullback(function, at, cotangent):
        value, vjp = jax.vjp(function, at)
        return value, vjp(cotangent)

    def update(grads, opt_state, params):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p + 1e-3 * u, params, updates), opt_state

    both = jax.jit(functools.partial(pullback, hidden))
    lookup = jax.jit(functools.partial(pullback, lambda t: jnp.take(t, tokens, axis=0)))
    forward, head_forward = jax.jit(hidden), jax.jit(total)
    head_both = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    update = jax.jit(update)
    loss = jax.jit(jax.value_and_grad(lambda p: task.loss(model, p, batch, None)[0]))
    return {
        "data generation": lambda: make_batch(zero),
        "layers, forward": lambda: forward(params),
        "layers, forward and backward": lambda: both(params, cotangent),
        "  of which embedding and its gradient": lambda: lookup(table, cotangent),
        "head and loss, forward": lambda: head_forward(params, rows),
        "head and loss, forward and backward": lambda: head_both(params, rows),
        "optimiser": lambda: update(params, opt_state, params),
        "loss and gradient": lambda: loss(params),
    }


def describe(case: Case, steps: Steps) -> dict[str, Any]:
    """What a worker says of itself when it is warm."""
    leaves = jax.tree.leaves(steps.state.params)
    return {
        "side": "jaxmodels",
        **case._asdict(),
        "parameters": count_parameters(steps.state.params),
        "dtype": str(leaves[0].dtype),
        "machine": machine(),
    }


def parse(arguments: list[str] | None = None) -> Case:
    parser = argparse.ArgumentParser(description="Our side of the training-step benchmark.")
    parser.add_argument("--mixer", required=True)
    for name in ("length", "batch", "labels"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return Case(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> None:
    case = parse(arguments)
    setup = set_up(case)
    steps = Steps(setup)
    steps.time_calls(calls=2, steps=1)  # compiles; every number of steps runs through one program

    def answer(**request: int) -> dict[str, Any]:
        if "parts" in request:
            return take_turns(parts(setup, steps.state.params), request["parts"])
        return steps.time_calls(request["calls"], request["steps"])

    serve(describe(case, steps), answer)


if __name__ == "__main__":
    main()
