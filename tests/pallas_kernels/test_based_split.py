"""Exact sequence split of `pallas_kernels.based`: pieces on one device, and over eight (fake) devices.

Run: pytest tests/pallas_kernels/test_based_split.py
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.based import based, based_sharded, chunked, gradients, split
from pallas_kernels.based.dispatch import How
from tests.pallas_kernels import based_law as law

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 8)


def in_pieces(q, k, v, *, pieces, initial_state, segment_ids, normalize, epsilon):
    """The op of the law, in a given number of pieces."""
    real = None if segment_ids is None else (segment_ids > 0)[..., None, None]
    if real is not None:
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    how = How("chunked", normalize, epsilon, pieces)
    y, _, final = gradients.call(how, q, k, v, initial_state, segment_ids)
    return (y if real is None else jnp.where(real, y, 0)), final


@pytest.mark.parametrize("pieces", [2, 5])
@pytest.mark.parametrize("case", ["packed", "no_state", "f4_v16_grouped", "f8_v80"])
def test_pieces_are_exact(case, pieces):
    """5 pieces of 37 tokens: the last is not full."""
    with jax.enable_x64(True):
        op = functools.partial(in_pieces, pieces=pieces)
        law.check_numbers(op, law.CASES[case], np.float64, law.FLOAT64)


def test_one_segment_over_all_pieces_and_many_in_each():
    """Ids that go on, change at a cut, change within, and end."""
    rows = [[1] * 12, [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2], [1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4, 0]]
    rows += [[7] * 5 + [0] * 7, [0] * 12, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 0, 0]]
    case = law.Case(len(rows), 12, 1, 1, 3, 2)
    given = law.arguments(case)._replace(ids=np.array(rows, np.int32))
    with jax.enable_x64(True):
        wanted = law.exact(given)
        for pieces in (3, 4, 12):
            op = functools.partial(in_pieces, pieces=pieces)
            for what, a, w in zip(law.Results._fields, law.run(op, given), wanted):
                law.near(a, w, law.FLOAT64, what)


@pytest.mark.parametrize(
    ("kernel", "rows", "t", "pieces"),
    [
        ("gpu", 16, 32768, 8),
        ("gpu", 1, 65536, 128),
        ("gpu", 66, 8192, 2),
        ("gpu", 67, 8192, 1),
        ("gpu", 16, 1024, 2),
        ("gpu", 16, 1000, 1),
        ("tpu", 1, 65536, 1),
        ("chunked", 1, 65536, 1),
    ],
)
def test_policy_fills_a_gpu_and_nothing_else(kernel, rows, t, pieces):
    assert split.pieces_for(kernel, rows, t) == pieces


def sharded_numbers():
    """Run in a process with eight devices: every result of `based_sharded` against `exact`."""
    assert jax.device_count() == 8
    given = law.arguments(law.Case(3, 40, 2, 1, 4, 3))
    ids = np.array([[2] * 40, [1] * 5 + [2] * 8 + [3] * 17 + [0] * 10, [1] * 12 + [4] * 28])
    ids = ids.astype(np.int32)
    settings = [(ids, given.state, True), (None, None, True), (ids, None, False)]
    for segment_ids, state, check_vma in (*settings, (None, given.state, False)):
        one = given._replace(ids=segment_ids, state=state)
        op = functools.partial(over_devices, check_vma=check_vma)
        for what, a, w in zip(law.Results._fields, law.run(op, one), law.exact(one)):
            if w is not None:
                law.near(a, w, law.FLOAT64, f"{what}, {check_vma=}")
    heads_over_devices()
    print("sharded: ok")


def over_devices(q, k, v, *, initial_state, segment_ids, normalize, epsilon, check_vma):
    """The op of the law, its tokens over eight devices."""
    tokens, whole = P(None, "sequence"), P()
    optional = lambda x, spec: None if x is None else spec
    op = lambda q, k, v, state, ids: based_sharded(
        q, k, v, initial_state=state, segment_ids=ids, axis_name="sequence"
    )
    return jax.shard_map(
        op,
        mesh=jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(*[tokens] * 3, optional(initial_state, whole), optional(segment_ids, tokens)),
        out_specs=(tokens, whole),
        check_vma=check_vma,
    )(q, k, v, initial_state, segment_ids)


def heads_over_devices():
    """The op itself on a head per device: q, k and v vary over the mesh, the state of the group's rows does not."""
    given = law.arguments(law.Case(1, 9, 8, 8, 4, 3, state=False))
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, scale = P(None, None, "tensor"), jnp.float64(2.0)

    def loss(q, k, v, scale):
        def local(q, k, v, scale):
            state = scale * jnp.ones((1, 1, 15, 4))
            return jax.lax.psum(jnp.sum(based(q, k, v, initial_state=state)[0] ** 2), "tensor")

        specs = (heads, heads, heads, P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(q, k, v, scale)

    def whole(q, k, v, scale):
        state = scale * jnp.ones((1, 8, 15, 4))
        return jnp.sum(based(q, k, v, initial_state=state)[0] ** 2)

    for actual, wanted in zip(
        jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*given[:3], scale),
        jax.jit(jax.grad(whole, (0, 1, 2, 3)))(*given[:3], scale),
    ):
        law.near(actual, np.asarray(wanted), law.FLOAT64)


def test_eight_devices_share_one_sequence_exactly():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    code = "from tests.pallas_kernels import test_based_split as t; t.sharded_numbers()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "sharded: ok" in done.stdout, done.stderr[-3000:]
