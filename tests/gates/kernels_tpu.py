"""python -m tests.gates.kernels_tpu [v5e v5p v6e]: compile the TPU kernels of every core shape with the real compiler.

Runs where libtpu is installed (`make compile-gates` sets that up), without a TPU; one process at a time. Per chip and shape it
asserts that the op, left to choose, takes the kernel; that the forward and backward kernels fit in VMEM; that no operand or
gradient per token is copied on its way in or out; and that one decoding step is one fusion which reads and writes the state
once. Prints a line per program, with the VMEM that blocks and scratch take, and how many compiled; exit code 1 when one did not.
"""

import functools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding, use_abstract_mesh

from pallas_kernels.based import based, expanded_width, tpu_layout
from pallas_kernels.based.shapes import CORE, Core, Shape
from tests.gates import targets

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
FORWARD = ("based_forward",)
TRAINING = ("based_forward", "based_backward_q", "based_backward_kv")

# Beyond what every kernel must take: shapes that are laid out differently.
MORE = {
    "ragged": Core(Shape(1, 2047, 3, 3, 4, 16), "float32", state=True),
    "multi_query": Core(Shape(1, 1024, 16, 1, 16, 64), "bfloat16", segments=True, state=True),
    "few_tokens": Core(Shape(2, 37, 2, 2, 8, 80), "bfloat16", segments=True),
    "wide_float32": Core(Shape(1, 512, 4, 4, 32, 128), "float32", segments=True, state=True),
}


# Between the projections of a layer: here no array of tokens may be copied on its way to or from a kernel.
# (XLA may transpose a weight instead, once for all tokens.)
LAID_OUT = {
    "paper": Core(Shape(2, 2048, 16, 16, 16, 64), "bfloat16"),
    "released_1b": Core(Shape(2, 2048, 16, 16, 16, 112), "bfloat16"),
    "wide": Core(Shape(2, 2048, 8, 8, 32, 128), "bfloat16"),
}


class Case(NamedTuple):
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: tuple[str, ...]
    core: Core


def cases() -> Iterator[Case]:
    for name, core in {**CORE, **MORE}.items():
        arguments = arguments_of(core)
        if core.shape.t == 1:
            yield Case(f"{name}, step", forward, arguments, (), core)
            continue
        yield Case(f"{name}, forward", forward, arguments, FORWARD, core)
        yield Case(f"{name}, training", training, arguments, TRAINING, core)
    packed = CORE["packed"]
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), arguments_of(packed)
    )
    yield Case("packed, training, vmap", jax.vmap(training), rows, TRAINING, packed)
    # The forward kernel twice: remat runs it again.
    again = ("based_forward", *TRAINING)
    remat = functools.partial(training, op=jax.checkpoint(forward))
    yield Case("packed, training, remat", remat, arguments_of(packed), again, packed)
    for name, core in LAID_OUT.items():
        layer, given = functools.partial(in_a_layer, core), layer_arguments(core)
        yield Case(f"{name}, layer", layer, given, FORWARD, core)
        yield Case(f"{name}, layer, training", jax.grad(layer), given, TRAINING, core)


def arguments_of(core: Core) -> tuple[Any, ...]:
    """q, k, v, the state or None, the ids or None."""
    b, t, h, g, f, v = core.shape
    array = lambda *shape: jax.ShapeDtypeStruct(shape, core.dtype)
    state = jax.ShapeDtypeStruct((b, g, expanded_width(f), v + 1), jnp.float32)
    ids = jax.ShapeDtypeStruct((b, t), jnp.int32)
    tokens = array(b, t, h, f), array(b, t, g, f), array(b, t, g, v)
    return *tokens, state if core.state else None, ids if core.segments else None


def forward(q, k, v, state, ids):
    return based(q, k, v, initial_state=state, segment_ids=ids)


def training(q, k, v, state, ids, op=forward):
    """Both outputs are used, so that every gradient there is gets computed."""

    def loss(given):
        y, after = op(*given, ids)
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + jnp.sum(after)

    return jax.grad(loss)((q, k, v, state))


def layer_arguments(core: Core) -> tuple[Any, ...]:
    b, t, h, g, f, v = core.shape
    array = lambda *shape: jax.ShapeDtypeStruct(shape, core.dtype)
    weights = dict(q=array(h * v, h * f), k=array(h * v, g * f), v=array(h * v, g * v))
    return weights | dict(o=array(h * v, h * v)), array(b, t, h * v)


def in_a_layer(core: Core, weights, x):
    """Projections, the op, the output projection and the residual, reduced to a number."""
    b, t, h, g, f, v = core.shape
    q, k, values = (
        (x @ weights[name]).reshape(b, t, heads, width)
        for name, heads, width in (("q", h, f), ("k", g, f), ("v", g, v))
    )
    y, _ = based(q, k, values)
    out = x + y.reshape(b, t, h * v) @ weights["o"]
    return jnp.sum(jnp.square(out.astype(jnp.float32)))


def compile_case(case: Case, device: jax.Device) -> str:
    """Compiles and inspects; the VMEM of the largest kernel in words, or the bytes of a decoding step."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
    arguments = jax.tree.map(place, case.arguments)
    donated = 3 if not case.kernels else ()
    with use_abstract_mesh(targets.lone_mesh(device)):
        traced = jax.jit(case.function, donate_argnums=donated).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("tpu",))
    calls = lowered.as_text().count("tpu_custom_call")
    assert calls == len(case.kernels), f"{calls} kernels, not {len(case.kernels)}"
    compiled = lowered.compile()
    text = compiled.as_text()
    for name in case.kernels:
        assert f"{name}." in text or f"%{name} " in text, f"no {name} in the compiled program"
    if not case.kernels:
        return check_step(case.core, compiled, text)
    if "layer" in case.name:
        check_copies(case.core, text)
    plan = tpu_layout.make_plan(*arguments_of(case.core)[:3], case.core.segments or None)
    return f"VMEM {tpu_layout.memory_estimate(plan) / 2**20:4.1f} MiB"


def entry(text: str) -> list[str]:
    """The instructions of the compiled program, without those inside of fusions."""
    return text[text.index("\nENTRY") :].splitlines()


def check_copies(core: Core, text: str) -> None:
    """No copy or transpose of an array of tokens as large as k: what XLA gives and takes are the kernels' own layouts."""
    b, t, _, g, f, _ = core.shape
    for line in entry(text):
        found = re.search(r"= \w+\[([0-9,]+)\][^ ]* (copy|transpose)\(", line)
        if found is None:
            continue
        sizes = [int(n) for n in found[1].split(",")]
        small = math.prod(sizes) < b * t * g * f
        assert small or not {t, b * t} & set(sizes), f"copied: {line.strip()[:160]}"


def check_step(core: Core, compiled: Any, text: str) -> str:
    """One instruction makes a state, in place of the one that was given."""
    b, _, _, g, f, v = core.shape
    shape = f"f32[{b},{g},{expanded_width(f)},{v + 1}]"
    makes = re.compile(r" = (.*) (fusion|copy|transpose)\(")
    made = [m for m in map(makes.search, entry(text)) if m and shape in m[1]]
    assert len(made) == 1, f"{len(made)} instructions make a state"
    assert made[0][2] == "fusion"
    state = b * g * expanded_width(f) * (v + 1) * 4
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= state, "the state is not updated in place"
    return f"state {state / 2**20:.2f} MiB, {memory.alias_size_in_bytes / state:.2f} in HBM's tiles"


def main(chips: list[str]) -> int:
    targets.prepare_environment()
    failed, count = 0, 0
    for chip in chips:
        (device, *_) = topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices
        for case in cases():
            count, before = count + 1, time.monotonic()
            try:
                said = f"ok  {compile_case(case, device)}"
            except Exception as error:
                failed += 1
                said = f"FAILED: {type(error).__name__}: {str(error)[:600]}"
            seconds = time.monotonic() - before
            print(f"  {chip}  based {case.name:28s} {seconds:5.1f} s  {said}", flush=True)
    print(f"based on TPU: {count - failed} of {count} programs compiled, jax {jax.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(TOPOLOGIES)))
