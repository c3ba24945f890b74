"""python -m tests.gates.kernels_gpu: compile the Hopper kernels of every core shape to machine code for an H200.

Runs where the CUDA 13 plugin is installed (`make compile-gates` sets that up), without a GPU. Per program it asserts that the op,
left to choose, takes the kernels (and leaves float32 to XLA); that hardly a register is spilled at f <= 16; that no array of
tokens is copied on the way to a kernel whose widths need no padding; and that a decoding step is one fusion which reads and
writes the state once. Prints a line per program with registers, spilled bytes and shared memory, and how many compiled; exit
code 1 when one did not.
"""

import contextlib
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import SingleDeviceSharding, use_abstract_mesh

from pallas_kernels.based import based, expanded_width
from pallas_kernels.based.shapes import CORE, Core, Shape
from tests.gates import targets

REGISTERS = 168  # a thread's share of 65,536 among three warpgroups, in steps of 8
SHARED = 232_448  # bytes that a CTA of an H200 can have
# Bytes a thread may spill, by the padded width of q and k: up to eight registers where it matters.
SPILLED = {16: 32, 32: 1024}

# Beyond what every kernel must take: shapes that are laid out differently.
MORE = {
    "ragged": Core(Shape(1, 2047, 3, 3, 4, 16), "bfloat16", state=True),
    "multi_query": Core(Shape(1, 1024, 16, 1, 16, 64), "bfloat16", segments=True, state=True),
    "few_tokens": Core(Shape(2, 37, 2, 2, 8, 80), "bfloat16", segments=True),
    "two_tiles": Core(Shape(1, 1024, 4, 4, 16, 128), "bfloat16", segments=True, state=True),
    "long_row": Core(Shape(1, 32_768, 16, 16, 16, 64), "bfloat16"),
}


class Case(NamedTuple):
    name: str
    function: Callable[..., Any]
    core: Core
    kernels: int


class Kernel(NamedTuple):
    """What the compiler said of one kernel, and the shared memory that it asks for."""

    registers: int
    spilled: int
    shared: int


def cases() -> Iterator[Case]:
    for name, core in {**CORE, **MORE}.items():
        if core.shape.t == 1:
            yield Case(f"{name}, step", forward, core, 0)
            continue
        takes = core.dtype == "bfloat16"
        yield Case(f"{name}, forward", forward, core, 1 * takes)
        yield Case(f"{name}, training", training, core, 3 * takes)
    yield Case("packed, training, vmap", jax.vmap(training), CORE["packed"], 3)


def arguments_of(case: Case) -> tuple[Any, ...]:
    """q, k, v, the state or None, the ids or None."""
    b, t, h, g, f, v = case.core.shape
    lead = (2,) if "vmap" in case.name else ()
    array = lambda *shape: jax.ShapeDtypeStruct(lead + shape, case.core.dtype)
    state = jax.ShapeDtypeStruct((*lead, b, g, expanded_width(f), v + 1), jnp.float32)
    ids = jax.ShapeDtypeStruct((*lead, b, t), jnp.int32)
    tokens = array(b, t, h, f), array(b, t, g, f), array(b, t, g, v)
    return *tokens, state if case.core.state else None, ids if case.core.segments else None


def forward(q, k, v, state, ids):
    return based(q, k, v, initial_state=state, segment_ids=ids)


def training(q, k, v, state, ids):
    """Both outputs are used, so that every gradient there is gets computed."""

    def loss(given):
        y, after = forward(*given, ids)
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + jnp.sum(after)

    return jax.grad(loss)((q, k, v, state))


def compile_case(case: Case, device: jax.Device) -> str:
    """Compiles and inspects; the resources in words."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
    arguments = jax.tree.map(place, arguments_of(case))
    is_step = case.core.shape.t == 1
    with use_abstract_mesh(targets.lone_mesh(device)), recorded() as found:
        traced = jax.jit(case.function, donate_argnums=3 if is_step else ()).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    text = compiled.as_text()
    calls = len(re.findall(r'custom_call_target="mosaic_gpu', text))
    assert calls == case.kernels, f"{calls} kernels, not {case.kernels}"
    if is_step:
        return check_step(case.core, compiled, text)
    if not calls:
        return "left to XLA, as it should be"
    width = 16 if case.core.shape.f <= 16 else 32
    for kernel in found:
        assert kernel.registers <= REGISTERS, f"{kernel.registers} registers"
        assert kernel.spilled <= SPILLED[width], f"{kernel.spilled} bytes spilled"
        assert kernel.shared <= SHARED, f"{kernel.shared} bytes of shared memory"
    check_copies(case.core, text)
    said = (f"{k.registers}/{k.spilled}/{k.shared / 1024:.0f}K" for k in found)
    return f"registers/spilled/shared {'  '.join(said)}"


@contextlib.contextmanager
def recorded() -> Iterator[list[Kernel]]:
    """Fills the list with the kernels compiled inside, in the order of compilation.

    ptxas writes to the process's own streams, from C++.
    """
    found, shared, make = [], [], plgpu.kernel

    def kernel(*args, **fixed):
        shared.append(shared_memory(fixed["scratch_types"]))
        return make(*args, **fixed)

    plgpu.kernel = kernel
    saved = [os.dup(stream) for stream in (1, 2)]
    with tempfile.TemporaryFile() as log:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            yield found
        finally:
            for stream, copy in zip((1, 2), saved):
                os.dup2(copy, stream)
                os.close(copy)
            plgpu.kernel = make
            log.seek(0)
            said = log.read().decode(errors="replace")
    spilled = [int(n) for n in re.findall(r"stack frame, (\d+) bytes spill stores", said)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    # A kernel that an earlier program had is not compiled again; in a training program that is the forward one, the first.
    found += [Kernel(*three) for three in zip(registers, spilled, shared[-len(registers) :])]


def shared_memory(scratch: dict[str, Any]) -> int:
    """Bytes of the buffers; barriers take a few more."""
    sizes = (
        math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for x in scratch.values()
        if hasattr(x, "shape")
    )
    return sum(sizes)


def entry(text: str) -> list[str]:
    """The instructions of the compiled program, without those inside of fusions."""
    return text[text.index("\nENTRY") :].splitlines()


def check_copies(core: Core, text: str) -> None:
    """Nothing as large as k is copied, transposed or padded where the widths are the kernel's own."""
    b, t, _, g, f, v = core.shape
    if f not in (16, 32) or v % 64 or t % 8:
        return
    for line in entry(text):
        found = re.search(r"= bf16\[([0-9,]+)\][^ ]* (copy|transpose|pad)\(", line)
        if found is not None:
            size = math.prod(int(n) for n in found[1].split(","))
            assert size < b * t * g * f, f"copied: {line.strip()[:160]}"


def check_step(core: Core, compiled: Any, text: str) -> str:
    """One instruction makes a state, in place of the one that was given."""
    b, _, _, g, f, v = core.shape
    shape = f"f32[{b},{g},{expanded_width(f)},{v + 1}]"
    makes = re.compile(r" = (.*) (fusion|copy|transpose)\(")
    made = [m for m in map(makes.search, entry(text)) if m and shape in m[1]]
    assert [m[2] for m in made] == ["fusion"], f"{len(made)} instructions make a state"
    state = b * g * expanded_width(f) * (v + 1) * 4
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= state, "the state is not updated in place"
    return f"one fusion, state {state / 2**20:.2f} MiB in place"


def main() -> int:
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    targets.prepare_environment()
    (device, *_) = targets.cuda_devices()
    failed, count = 0, 0
    for case in cases():
        count, before = count + 1, time.monotonic()
        try:
            said = f"ok  {compile_case(case, device)}"
        except Exception as error:
            failed += 1
            said = f"FAILED: {type(error).__name__}: {str(error)[:600]}"
        print(
            f"  h200  based {case.name:24s} {time.monotonic() - before:5.1f} s  {said}", flush=True
        )
    print(f"based on H200: {count - failed} of {count} programs compiled, jax {jax.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
