"""Which implementation of `pallas_kernels.based` a program gets: by platform, by what a kernel takes, and by name.

The kernels are stood in for by modules that leave a mark in the program. Run: pytest tests/pallas_kernels/test_based_dispatch.py
"""

import functools
import logging
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.based import based, chunked, dispatch
from tests.pallas_kernels import based_law as law

ROOT = pathlib.Path(__file__).parents[2]
CASE = law.Case(2, 11, 2, 1, 4, 3, segments=True)
MARKS = {"tpu": "cosine", "gpu": "tanh"}


@pytest.fixture
def kernels(monkeypatch):
    """Modules in place of tpu.py and gpu.py that compute by the XLA form, and mark it; they take what `refuses` lets them."""
    refuses = {}

    def stand_in(name, mark):
        def forward(q, *rest, **fixed):
            return chunked.forward(q + 0 * mark(q), *rest, **fixed)

        def backward(q, *rest, **fixed):
            return chunked.backward(q + 0 * mark(q), *rest, **fixed)

        module: Any = types.ModuleType(name)
        module.forward, module.backward = forward, backward
        module.supports = lambda q, k, v, state, ids: refuses.get(name)
        monkeypatch.setitem(sys.modules, f"pallas_kernels.based.{name}", module)

    stand_in("tpu", jnp.cos)
    stand_in("gpu", jnp.tanh)
    dispatch._log_once.cache_clear()
    return refuses


def program(platform, implementation=None, differentiate=True):
    """StableHLO of a gradient, lowered on this machine for `platform`."""
    given = law.cast(law.arguments(CASE), jnp.float32)

    def loss(q, k, v):
        op = functools.partial(based, segment_ids=given.ids, implementation=implementation)
        return jnp.sum(op(q, k, v)[0] ** 2)

    f = jax.jit(jax.grad(loss) if differentiate else loss)
    return f.trace(*given[:3]).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("differentiate", [True, False])
def test_each_platform_gets_its_kernel_whatever_machine_compiles(kernels, differentiate):
    texts = {p: program(p, differentiate=differentiate) for p in ("tpu", "cuda", "cpu")}
    for name, platform in dispatch.KERNELS.items():
        for other, text in texts.items():
            assert (MARKS[name] in text) == (other == platform)


def test_both_directions_take_the_kernel(kernels):
    assert program("tpu").count("cosine") == 2
    assert program("tpu", differentiate=False).count("cosine") == 1


def test_what_a_kernel_does_not_take_goes_to_xla_and_the_log_says_why_once(kernels, caplog):
    kernels["tpu"] = "f=40 is wider than 32"
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        for _ in range(2):
            assert "cosine" not in program("tpu")
    assert [r.getMessage() for r in caplog.records] == [
        "based: an XLA form runs instead of the tpu kernel: f=40 is wider than 32"
    ]


def test_a_kernel_that_cannot_be_imported_is_a_reason(kernels, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pallas_kernels.based.gpu", None)
    assert "tanh" not in program("cuda")
    assert "cannot be imported" in caplog.text


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_named_kernel_runs_or_says_why_it_cannot(kernels, name):
    law.check_numbers(functools.partial(based, implementation=name), CASE, np.float32, law.FLOAT32)
    assert MARKS[name] in program("cpu", name)
    kernels[name] = "it needs Hopper"
    with pytest.raises(ValueError, match=f"implementation='{name}'.*it needs Hopper"):
        program("cpu", name)


@pytest.mark.parametrize("name", [None, "tpu"])
def test_vmap_adds_rows_to_the_kernels_batch(kernels, name):
    given = law.cast(law.arguments(CASE), jnp.float32)
    twice = [jnp.stack([x, x, x]) for x in given[:3]]
    loss = lambda q, k, v: jnp.sum(based(q, k, v, implementation=name)[0] ** 2)
    f = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None, 0)))
    args = (twice[0], given.k, twice[2])
    text = f.trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert "cosine" in text
    assert "tensor<6x11x2x4xf32>" in text.replace(" ", "")


def test_two_platforms_in_one_exported_program(kernels):
    x = jnp.ones((1, 5, 1, 4))
    f = jax.jit(lambda x: based(x, x, x)[0])
    module = jax.export.export(f, platforms=("cpu", "tpu"))(x)
    assert "cosine" in module.mlir_module()
    np.testing.assert_allclose(module.call(x), f(x))


def test_programs_that_the_compiler_spreads_over_devices_use_xla(kernels):
    """Run in this process: lowering needs no devices, only a mesh."""
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((4, 5, 1, 4), jnp.float32, sharding=spread)
    f = jax.jit(lambda x: based(x, x, x)[0])
    assert "cosine" not in f.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    by_hand = jax.jit(
        jax.shard_map(
            lambda x: based(x, x, x)[0],
            mesh=mesh,
            in_specs=jax.sharding.PartitionSpec("data"),
            out_specs=jax.sharding.PartitionSpec("data"),
        )
    )
    assert "cosine" in by_hand.trace(x).lower(lowering_platforms=("tpu",)).as_text()


def test_a_call_on_a_cpu_imports_nothing_of_pallas():
    code = (
        "import sys, jax, jax.numpy as jnp, jaxmodels, pallas_kernels; from pallas_kernels.based import based; "
        "x = jnp.ones((1, 9, 1, 4)); jax.grad(lambda x: based(x, x, x)[0].sum())(x); "
        "print([m for m in sys.modules if m.startswith('jax.experimental.pallas') or m.endswith(('based.tpu', 'based.gpu'))])"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
