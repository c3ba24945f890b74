"""A process that times one form of one op: a side of `python -m eval bench --op`.

    python -m eval.bench.op_worker --op based --form chunked

A process per form, because a call that touches gigabytes leaves the next one in its process a heap that was given back and
cold caches: BASED's chunked form at 4,096 takes 54 instead of 29 ms right after its quadratic one.

Answers {"length": n, "direction": d, "calls": k} with {"temporary": bytes, "seconds": [...], "processor": [...]}, without
times where the program needs more memory than allowed, or {} where the form has no such direction.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from eval.bench.op_forms import OPS, Form, Size
from eval.bench.timing import seconds_of
from eval.bench.worker import serve

GIB = 2**30
DECODE_TOKENS = 32  # of one program, as in a loop that generates
SETTLE = 0.05  # seconds of uncounted calls, one at least, before a turn: the other sides computed meanwhile
SHORT = (
    2e-3  # an accelerator's call below this is measured as several, or the host would be measured
)


class Compiled(NamedTuple):
    """A program with its arguments; what it needs beside them, in bytes; how many tokens or calls it stands for."""

    call: Callable[[], Any]
    temporary: int
    units: int = 1


def temporary_bytes(program: Any) -> int:
    """Bytes that a compiled program allocates beside its arguments and results; 0 where XLA does not say."""
    analysis = program.memory_analysis()
    return int(getattr(analysis, "temp_size_in_bytes", 0) or 0)


def compile_form(form: Form, size: Size, direction: str) -> Compiled | None:
    """Forward; every gradient of the sum of y times a fixed cotangent; or tokens decoded one after the other."""
    if direction == "decode":
        return _compile_decode(form, size) if form.decode else None
    arrays = normal_arrays(form.shapes(size), size)
    if direction == "forward":
        return _compiled(form.call, *arrays)
    result = jax.eval_shape(form.call, *arrays)
    cotangent = jax.random.normal(jax.random.key(0), result.shape, result.dtype)
    scalar = lambda *xs: jnp.sum((form.call(*xs[:-1]) * xs[-1]).astype(jnp.float32))
    return _compiled(
        jax.value_and_grad(scalar, argnums=tuple(range(len(arrays)))), *arrays, cotangent
    )


def _compile_decode(form: Form, size: Size) -> Compiled:
    assert form.decode
    step, carry = form.decode(size)
    token = normal_arrays(form.shapes(size._replace(length=1)), size)
    run = lambda carry, *token: jax.lax.scan(
        lambda c, _: step(c, *token), carry, length=DECODE_TOKENS
    )
    return _compiled(run, carry, *token)._replace(units=DECODE_TOKENS)


def normal_arrays(shapes: Sequence[tuple[int, ...]], size: Size) -> list[Array]:
    """Standard normal numbers, the same for the same shapes."""
    key = jax.random.key(size.length)
    return [
        jax.random.normal(jax.random.fold_in(key, i), shape, size.dtype)
        for i, shape in enumerate(shapes)
    ]


def _compiled(function: Callable[..., Any], *args: Any) -> Compiled:
    program = jax.jit(function).lower(*args).compile()
    return Compiled(functools.partial(program, *args), temporary_bytes(program))


def times(compiled: Compiled, calls: int, settle: float = SETTLE) -> dict[str, list[float]]:
    """Seconds, wall and processor, of `calls` measurements, per call or decoded token."""
    deadline = time.perf_counter() + settle
    latest = seconds_of(compiled.call)[0]
    while time.perf_counter() < deadline:
        latest = seconds_of(compiled.call)[0]
    several = 1 if jax.default_backend() == "cpu" else max(1, math.ceil(SHORT / latest))

    def call():
        result = compiled.call()
        for _ in range(several - 1):
            result = compiled.call()
        return result

    pairs = [seconds_of(call) for _ in range(calls)]
    units = several * compiled.units
    return {
        name: [x / units for x in column]
        for name, column in zip(("seconds", "processor"), zip(*pairs))
    }


def peak() -> dict[str, float]:
    """Operations and bytes per second of this machine: the best of a few large products, and of a few large copies."""
    n, elements = 1536, 2**25
    a = jnp.ones((n, n))
    product, copy = jax.jit(jnp.dot), jax.jit(lambda x: x + 1)
    best = lambda call: min(seconds_of(call)[0] for _ in range(8))
    x = jnp.zeros(elements)
    return {
        "flops": 2 * n**3 / best(lambda: product(a, a)),
        "bandwidth": 2 * x.nbytes / best(lambda: copy(x)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one form of one op.")
    parser.add_argument("--op", choices=sorted(OPS), required=True)
    parser.add_argument("--form", required=True)
    parser.add_argument("--memory", type=float, default=4.0)
    parser.add_argument("--peak", action="store_true", help="also measure what the machine can do")
    for name, default in Size._field_defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in Size._field_defaults}
    known: dict[tuple[int, str], Compiled | None] = {}

    def answer(length: int, direction: str, calls: int) -> dict[str, Any]:
        if (length, direction) not in known:
            known.clear()
            size = Size(length, **given)
            form = OPS[args.op].forms(size)[args.form]
            known[length, direction] = compile_form(form, size, direction)
        compiled = known[length, direction]
        if compiled is None:
            return {}
        fits = compiled.temporary <= args.memory * GIB
        return {"temporary": compiled.temporary} | (times(compiled, calls) if fits else {})

    ready = {"side": args.form, "device": jax.devices()[0].device_kind}
    serve(ready | ({"peak": peak()} if args.peak else {}), answer)


if __name__ == "__main__":
    main()
