"""A model and a task of a few hundred numbers, for tests of the training loop; also a command that trains them.

    python tests/train/tiny.py WORKDIR key=value ...

The task: the label of token x is (5 x + 1) mod vocabulary. A row has 1 to `length` labels, lengths alternate between two
programs, and config.data.bad_steps names steps whose loss is NaN.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from train.config import base_config
from train.config_paths import set_key
from train.tasks import Task

VOCAB, WIDTH, LENGTHS, PERIOD = 16, 8, (4, 6), 6


class TinyModel(nn.Module):
    """Embedding, one layer, tied head."""

    d_model: int = WIDTH
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, self.d_model, name="embed")
        x = embed(tokens)
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        y = nn.silu(nn.Dense(2 * self.d_model, name="in_proj")(x))
        x = nn.LayerNorm(name="norm")(x + nn.Dense(self.d_model, name="out_proj")(y))
        return embed.attend(x)


def tiny_config(**overrides) -> ConfigDict:
    """base_config, small, nothing on the terminal; keys by path, as on the command line: tiny_config(**{"mesh.fsdp": 2})."""
    config = base_config()
    with config.unlocked():
        config.data.bad_steps = ()
    quiet = {"log.tensorboard": False, "log.progress": False, "checkpoint.every_seconds": 0.0}
    small = {
        "steps": 24,
        "batch_size": 16,
        "steps_per_call": 4,
        "learning_rate": 0.01,
        "max_bad_steps": 3,
    }
    rhythm = {"log.every_steps": 5, "eval.every_steps": 10, "model.embed_dropout": 0.0}
    for path, value in {**quiet, **small, **rhythm, **overrides}.items():
        set_key(config, path, value)
    return config


def tiny_model(config: ConfigDict) -> TinyModel:
    return TinyModel(dropout=config.model.embed_dropout)


def tiny_task(config: ConfigDict) -> Task:
    seed = config.seed if config.data.seed is None else config.data.seed
    rows = config.batch_size
    bad_steps = jnp.asarray([*config.data.bad_steps, -1])

    def program_at(step):
        return LENGTHS[step // PERIOD % len(LENGTHS)], PERIOD - step % PERIOD

    def batch(program, inputs, step, offset):
        del inputs, offset
        return make_batch(jax.random.fold_in(jax.random.key(seed + 1), step), rows, program) | {
            "poison": jnp.where((bad_steps == step).any(), jnp.nan, jnp.zeros(rows))
        }

    return Task(
        name="tiny",
        batch_size=rows,
        sample_tokens=(1, max(LENGTHS)),
        tokens_per_step=lambda program: rows * program,
        program_at=program_at,
        inputs=lambda step, count: {},
        batch=batch,
        loss=tiny_loss,
        evaluate=tiny_evaluate,
        best=("eval/accuracy", "max"),
        state_length=max(LENGTHS),
    )


def make_batch(key, rows, length):
    tokens = jax.random.randint(key, (rows, length), 0, VOCAB)
    labels = 1 + jax.random.randint(key, (rows, 1), 0, length)
    return {"tokens": tokens, "weights": (jnp.arange(length) < labels).astype(jnp.float32)}


def tiny_loss(model, params, batch, key):
    rngs = None if key is None else {"dropout": key}
    logits = model.apply({"params": params}, batch["tokens"], rngs=rngs)
    targets = (5 * batch["tokens"] + 1) % VOCAB
    losses = -jnp.take_along_axis(nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    weights, count = batch["weights"], batch["weights"].sum()
    total = (losses * (weights + batch["poison"][:, None])).sum()
    right = ((logits.argmax(-1) == targets) * weights).sum()
    return total / count, {"loss": (total, count), "accuracy": (right, count)}


@partial(jax.jit, static_argnums=0)
def _evaluate(model, params):
    batch = make_batch(jax.random.key(7), 32, LENGTHS[0]) | {"poison": jnp.zeros(32)}
    return tiny_loss(model, params, batch, None)[1]


def tiny_evaluate(model, params):
    sums = jax.device_get(_evaluate(model, params))
    return {f"eval/{name}": float(total / count) for name, (total, count) in sums.items()}


def train_tiny(config, workdir, **kwargs):
    """`train.loop.run` with the tiny model and task in the place of the real ones."""
    from unittest import mock

    from train import loop

    with mock.patch.multiple(
        loop,
        build_model=tiny_model,
        build_task=tiny_task,
        state_bytes=lambda model, length: 4 * model.d_model,
        legacy_state_bytes=lambda model, length: 0,
    ):
        return loop.run(config, workdir, **kwargs)


def main(workdir: str, *overrides: str) -> int:
    from train.cli import report_errors

    pairs = dict(pair.split("=", 1) for pair in overrides)
    pause = float(
        pairs.pop("pause", 0)
    )  # seconds per evaluation, so that a test has time to interrupt
    bad_steps = pairs.pop("bad_steps", "")
    config = tiny_config(**pairs)
    config.data.bad_steps = tuple(int(step) for step in bad_steps.split(",") if step)

    def train():
        train_tiny(config, Path(workdir))
        return 0

    if pause:
        import time

        real = tiny_evaluate
        globals()["tiny_evaluate"] = lambda *args: (time.sleep(pause), real(*args))[1]
    return report_errors(train, debug=False)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
