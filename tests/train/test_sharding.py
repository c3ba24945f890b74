"""Mesh errors and placement rules; the same losses on one device and on eight, and checkpoints that change mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from tests.train.tiny import tiny_config
from train.errors import UserError
from train.sharding import AXES, check_batch, make_mesh, partition_spec

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("params/embed/embedding", (16, 8), P("tensor", "fsdp")),
        ("opt_state/0/mu/embed/embedding", (16, 8), P("tensor", "fsdp")),  # moments follow
        ("params/lm_head/kernel", (8, 16), P("fsdp", "tensor")),
        ("params/layers_0/mixer/Wqkv/kernel", (8, 24), P("fsdp", "tensor")),
        ("params/layers_0/mixer/out_proj/kernel", (8, 8), P("tensor", "fsdp")),
        (
            "params/stack/mixer/out_proj/kernel",
            (3, 8, 8),
            P(None, "tensor", "fsdp"),
        ),  # a scan's layers
        ("params/layers_0/mixer/Wqkv/kernel", (7, 24), P(None, "tensor")),  # 7 is odd: whole
        ("params/layers_0/norm1/scale", (8,), P()),
        ("params/layers_0/mixer/Wqkv/bias", (24,), P()),
        ("opt_state/0/count", (), P()),
        ("step", (), P()),
    ],
)
def test_rules(name, shape, expected):
    mesh = AbstractMesh((2, 2, 2, 1), AXES)
    assert partition_spec(name, shape, mesh) == expected


def test_axes_of_one_device_are_left_out():
    assert partition_spec("params/a/kernel", (8, 8), AbstractMesh((8, 1, 1, 1), AXES)) == P(
        None, None
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"data=3, fsdp=1, tensor=1, sequence=1\) does not fit 1 cpu device"),
        ({"data": -1, "fsdp": 2}, "does not fit 1 cpu device"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "sizes are 1 or more"),
    ],
)
def test_impossible_meshes(sizes, message):
    config = tiny_config(**{f"mesh.{axis}": size for axis, size in sizes.items()})
    with pytest.raises(UserError, match=message):
        make_mesh(config, jax.devices()[:1])


def test_batch_must_divide():
    with pytest.raises(
        UserError, match="batch_size=12 does not divide by mesh data\\*fsdp=8; use a multiple of 8"
    ):
        check_batch(tiny_config(batch_size=12), 8)
    config = tiny_config(batch_size=16, **{"optimizer.accumulate": 4})
    with pytest.raises(UserError, match=r"accumulate=4; use a multiple of 32"):
        check_batch(config, 8)
    check_batch(config, 4)


def test_batch_against_the_mesh_of_a_run():
    with pytest.raises(UserError, match="batch_size=0"):
        make_mesh(tiny_config(batch_size=0), jax.devices()[:1])


EIGHT_DEVICES = """
import json, sys, tempfile
import jax
import numpy as np
from tests.train.tiny import tiny_config, tiny_model, tiny_task
from train.checkpoint import Checkpoints, restore_newest
from train.sharding import make_mesh
from train.step import make_training

def training(count, **mesh):
    config = tiny_config(**{f"mesh.{axis}": size for axis, size in mesh.items()}, **{"optimizer.accumulate": 2})
    devices = make_mesh(config, jax.devices()[:count])
    return config, make_training(config, tiny_model(config), tiny_task(config), devices)

def steps(run, state, count):
    losses = []
    for i in range(count):
        state, report = run.call(state, {}, np.int32(1), np.True_, program=4)
        losses.append(run.read(report).means["loss"])
    return losses, state

result = {}
_, one = training(1)
result["one"], _ = steps(one, one.init(), 8)
config, eight = training(8, data=4, fsdp=2)
losses, state = steps(eight, eight.init(), 4)
specs = jax.tree.map(lambda x: x.sharding, state)
assert specs == jax.tree.map(lambda x: x.sharding, eight.abstract)
kernel = state.params["in_proj"]["kernel"].sharding.spec
result["kernel"] = str(kernel)
assert state.opt_state[0].mu["in_proj"]["kernel"].sharding.spec == kernel
_, other = training(8, data=2, fsdp=2, tensor=2)
with tempfile.TemporaryDirectory() as workdir:
    checkpoints = Checkpoints(workdir, config, ("eval/accuracy", "max"))
    checkpoints.save(4, state, {}, {})
    checkpoints.close()
    moved = restore_newest(workdir, other.abstract).tree
assert jax.tree.map(lambda x: x.sharding, moved) == jax.tree.map(lambda x: x.sharding, other.abstract)
for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(moved)):
    np.testing.assert_array_equal(before, after)
rest, _ = steps(other, moved, 4)
result["eight"] = losses + rest
print(json.dumps(result))
"""


def on_eight_devices(script: str) -> Any:
    """What a script prints as its last line, JSON, in a process that has eight CPU devices."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_give_the_losses_of_one_and_a_checkpoint_moves_to_another_mesh():
    """4 steps on data=4, fsdp=2, then restored on data=2, fsdp=2, tensor=2 and 4 more, with two micro-batches each."""
    result = on_eight_devices(EIGHT_DEVICES)
    assert "fsdp" in result["kernel"]
    # float32 sums over the batch in another order: 1e-7 per step, grown a little by the optimiser over 8 steps
    np.testing.assert_allclose(result["one"], result["eight"], rtol=2e-5)


EVERY_MIXER = """
import json
import jax
import numpy as np
from jaxmodels.mixers.registry import MIXERS
from tests.train.tiny import tiny_config
from train.loop import build_model
from train.sharding import make_mesh
from train.step import make_training
from train.tasks import build_task

segment = ({"length": 16, "num_kv_pairs": 2, "num_examples": 1000},)
keys = {"model.vocab_size": 64, "model.d_model": 16, "model.embed_dropout": 0.1, "model.channel": "swiglu",
        "model.mixers": [{"name": name} for name in MIXERS], "model.num_layers": len(MIXERS),
        "data.train": segment, "data.test": segment}

def losses(count, **mesh):
    config = tiny_config(**keys, **{f"mesh.{axis}": size for axis, size in mesh.items()})
    devices = make_mesh(config, jax.devices()[:count])
    run = make_training(config, build_model(config), build_task(config), devices)
    state = run.init()
    for _ in range(6):
        state, report = run.call(state, {}, np.int32(1), np.True_, program=0)
        yield run.read(report).means["loss"]

print(json.dumps([list(losses(1)), list(losses(8, data=4, fsdp=2)), list(losses(8, data=2, fsdp=2, tensor=2))]))
"""


@pytest.mark.slow
def test_a_model_of_every_mixer_trains_the_same_on_eight_devices():
    """Associative recall, with dropout: the random numbers do not depend on the mesh either."""
    one, *eight = on_eight_devices(EVERY_MIXER)
    for losses in eight:
        np.testing.assert_allclose(losses, one, rtol=2e-5)


def python_path() -> str:
    return os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
