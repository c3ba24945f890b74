"""The Hopper kernels of `based`, in the GPU interpreter with race detection: the shared law, and what is theirs alone.

That they compile for an H200 is checked by tests/gates/kernels_gpu.py. One case runs in seconds, most of them the interpreter's
own, so each is chosen for several things at once.

Run: pytest tests/pallas_kernels/test_based_gpu.py
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import xla_bridge
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.based import expanded_width, gpu, gpu_layout
from tests.pallas_kernels import based_law as law

# The interpreter blocks a thread of the CPU client for every warpgroup that waits, and there are three: on two cores it would
# wait for ever. tests/conftest.py sets this before anything starts the client; here it is for this file alone.
if not xla_bridge.backends_are_initialized():
    os.environ.setdefault("NPROC", "8")
THREADS = int(os.environ.get("NPROC", os.cpu_count() or 1))

op = law.contract_op(gpu.forward, gpu.backward)
BF16 = jnp.bfloat16

CASES = {
    # Three chunks, so that both published states are used twice; two heads share a state; ids change inside chunks.
    "packed": law.Case(1, 150, 2, 1, 16, 64, segments=True),
    # A length and widths that must be padded; two tiles of values, the first of which has the denominator.
    "f8_v80": law.Case(1, 75, 1, 1, 8, 80),
    "f16_v112_grouped": law.Case(1, 37, 2, 1, 16, 112),
    "f4_v16": law.Case(2, 37, 1, 1, 4, 16, segments=True),
    # Ten slabs of features, a tile that is not full; no normaliser, no state.
    "f24_v15": law.Case(1, 64, 1, 1, 24, 15, state=False, normalize=False),
    "f32_v128": law.Case(1, 24, 1, 1, 32, 128),
    "one_token": law.Case(1, 1, 1, 1, 16, 64),
}


@pytest.fixture(autouse=True)
def interpreter():
    assert THREADS >= 4, (
        f"the interpreter needs 4 threads and has {THREADS}: NPROC was set too late"
    )
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize("name", CASES)
def test_numbers(name):
    law.check_numbers(op, CASES[name], BF16, law.BFLOAT16)


def test_reruns_are_bitwise_equal():
    law.check_reruns(op, law.Case(1, 70, 1, 1, 16, 16), BF16)


def test_decoding_gives_what_one_call_gives():
    case = law.Case(2, 3, 2, 1, 8, 16)
    law.check_cuts(op, case, BF16, law.BFLOAT16, 2)


@pytest.mark.parametrize(
    ("f", "cotangent"), [(4, False), (8, True), (15, False), (16, True), (24, False), (32, True)]
)
def test_states_convert_and_their_cotangents_are_the_transpose(f, cotangent):
    rng = np.random.default_rng(f)
    q, v = jnp.zeros((2, 64, 1, f), BF16), jnp.zeros((2, 64, 1, 80), BF16)
    plan = gpu_layout.plan_of(q, q, v, None)
    state = jnp.asarray(rng.normal(size=(2, 1, expanded_width(f), 81)), jnp.float32)
    back = gpu_layout.to_packed(*gpu_layout.to_kernel(state, plan), plan, 80)
    law.near(back, state, 1e-6)  # two products with weights, each rounded

    if cotangent:
        # <to_kernel(x), y> = <x, to_packed(y, cotangent)> and the same for the other direction.
        dual = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
            gpu_layout.to_kernel(state, plan),
        )
        inner = lambda x, y: sum(
            np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64))
            for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y))
        )
        pulled = gpu_layout.to_packed(*dual, plan, 80, cotangent=True)
        law.near(inner(gpu_layout.to_kernel(state, plan), dual), inner(state, pulled), 1e-5)
        pushed = gpu_layout.to_kernel(state, plan, cotangent=True)
        law.near(inner(gpu_layout.to_packed(*dual, plan, 80), state), inner(dual, pushed), 1e-5)


def test_segments_say_what_a_chunk_reads_adds_and_keeps():
    ids = np.ones((1, 192), np.int32)
    ids[0, 70:130], ids[0, 130:150], ids[0, 150:] = 5, 7, 0
    x = jnp.zeros((1, 192, 1, 16), BF16)
    info = gpu_layout.segments(jnp.asarray(ids), gpu_layout.plan_of(x, x, x, ids), 192)
    got = np.asarray(info[0])
    np.testing.assert_array_equal(got[:, gpu_layout.IDS].ravel(), ids[0])
    # before: segment 1, 1, 5; after: 1, 5, 7
    before, after = np.repeat([1, 1, 5], 64), np.repeat([1, 5, 7], 64)
    np.testing.assert_array_equal(got[:, gpu_layout.READS].ravel(), ids[0] == before)
    np.testing.assert_array_equal(got[:, gpu_layout.ADDS].ravel(), ids[0] == after)
    np.testing.assert_array_equal(got[:, gpu_layout.KEEPS], [[1] * 64, [0] * 64, [0] * 64])


def on(kind: str, platform: str = "gpu"):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"])
def test_hopper_is_taken(kind):
    x = jnp.zeros((1, 64, 2, 16), BF16)
    with on(kind):
        assert gpu.supports(x, x, x) is None


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA L4", "Tesla T4", "NVIDIA B200"])
def test_other_gpus_are_refused_by_name(kind):
    x = jnp.zeros((1, 64, 2, 16), BF16)
    with on(kind):
        assert kind in gpu.supports(x, x, x)


def test_no_gpu_is_refused():
    x = jnp.zeros((1, 64, 2, 16), BF16)
    assert "not a GPU" in gpu.supports(x, x, x)
    with on("TPU v5 lite", "tpu"):
        assert "not a GPU" in gpu.supports(x, x, x)


@pytest.mark.parametrize(
    ("dtype", "f", "v", "message"),
    [
        ("float32", 16, 64, "float32"),
        ("float16", 16, 64, "float16"),
        ("bfloat16", 33, 64, "f=33 is wider than 32"),
        ("bfloat16", 16, 129, "v=129 is wider than 128"),
    ],
)
def test_arguments_are_refused_with_their_value(dtype, f, v, message):
    q, values = jnp.zeros((1, 64, 2, f), dtype), jnp.zeros((1, 64, 2, v), dtype)
    with on("NVIDIA H200"):
        assert message in gpu.supports(q, q, values)
