"""The programs that must compile for every target: each mixer forward and backward and decoding, the model, the step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmodels.mixers.registry import MIXERS
from jaxmodels.models.language_model import build_language_model

WIDTH = 64


class Program(NamedTuple):
    """function(*arguments) is to be compiled; the arguments are shapes, or spread over a mesh where there is one."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    mesh: Mesh | None = None


def mixer_programs() -> Iterator[Program]:
    """A packed float32 batch, a long bfloat16 sequence (the chunked forms) and one decoding step, of each mixer."""
    for name, make in MIXERS.items():
        ids = jax.ShapeDtypeStruct((2, 96), jnp.int32)
        yield gradient_program(f"{name}, packed", make(d_model=WIDTH), 2, 96, jnp.float32, ids)
        narrow = make(d_model=WIDTH, dtype=jnp.bfloat16)
        yield gradient_program(f"{name}, long", narrow, 1, 1024, jnp.bfloat16, None)
        yield decode_program(name, narrow)


def gradient_program(name, mixer, batch, length, dtype, ids) -> Program:
    """Forward and backward, to the parameters and the input."""
    x = jax.ShapeDtypeStruct((batch, length, WIDTH), dtype)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)

    def loss(params, x, ids):
        y, _ = mixer.apply(params, x, None, segment_ids=ids)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    return Program(name, jax.grad(loss, argnums=(0, 1)), (params, x, ids))


def decode_program(name, mixer) -> Program:
    """One token with a state."""
    x = jax.ShapeDtypeStruct((4, 1, WIDTH), jnp.bfloat16)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)
    state = jax.eval_shape(lambda: mixer.init_state(4, 128, jnp.bfloat16))
    return Program(f"{name}, decoding", mixer.apply, (params, x, state))


def model_programs() -> Iterator[Program]:
    """A stack of every mixer: training with remat and bfloat16, and decoding."""
    model = build_language_model(
        vocab_size=256,
        d_model=WIDTH,
        num_layers=len(MIXERS),
        mixers=[{"name": name} for name in MIXERS],
        channel="swiglu",
        norm="rmsnorm",
        remat=True,
        dtype="bfloat16",
    )
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params, tokens):
        logits, _ = model.apply(params, tokens)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    yield Program("language model, training", jax.grad(loss), (params, tokens))
    state = jax.eval_shape(lambda: model.init_state(2, 128))
    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    yield Program("language model, decoding", model.apply, (params, token, state))


def train_step(devices: Sequence[jax.Device], **mesh: int) -> Program:
    """The whole training call of the loop on MQAR: data, forward, backward and optimiser, sharded over the devices."""
    from train.config import base_config
    from train.loop import build_model
    from train.sharding import make_mesh
    from train.step import make_training
    from train.tasks import build_task

    config = base_config()
    with config.unlocked():
        config.batch_size = 16
        config.model.vocab_size = 256
        config.model.mixers = [{"name": "base_conv", "kernel_size": -1}, {"name": "based"}]
        config.mesh.update(mesh)
    task = build_task(config)
    devices_mesh = make_mesh(config, devices)
    training = make_training(config, build_model(config), task, devices_mesh)
    program, _ = task.program_at(0)
    arguments = (training.abstract, task.inputs(0, 2), np.int32(2), np.bool_(False))
    call = training.call

    def step(*arguments):
        return call(*arguments, program=program)

    name = f"training call on MQAR, {len(devices)} device(s)"
    return Program(name, step, arguments, devices_mesh)
