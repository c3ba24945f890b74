"""Every implementation of an op against length: time forward, time with backward, and temporary memory.

The `plain` forms are written here as a newcomer would, in a few lines of jnp: what an implementation has to beat. They
run on the same random data, in the same process, in turns.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eval.bench.timing import summarise, take_turns
from eval.bench.worker import Worker
from pallas_kernels.attention import api as attention_api
from pallas_kernels.based import api as based_api
from pallas_kernels.long_conv import api as long_conv_api
from pallas_kernels.sliding_window import api as sliding_window_api

Call = Callable[..., Array]
GIB = 2**30


def plain_based(
    q: Float[Array, "b t h f"], k: Float[Array, "b t h f"], v: Float[Array, "b t h v"]
) -> Float[Array, "b t h v"]:
    """sum_(j<=i) w_ij v_j / sum_(j<=i) w_ij, w = 1 + s + s^2/2, s = q.k/sqrt(f), all pairs at once.

    Heads go before tokens first: the same products in the given layout take 2 to 4 times as long on a CPU.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    s = jnp.einsum("bhtf,bhsf->bhts", q, k) / q.shape[-1] ** 0.5
    weights = jnp.where(_causal(q.shape[2]), 1 + s + s * s / 2, 0)
    y = jnp.einsum("bhts,bhsv->bhtv", weights, v) / (jnp.sum(weights, -1)[..., None] + 1e-12)
    return jnp.swapaxes(y, 1, 2)


def plain_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    window: int | None = None,
) -> Float[Array, "b t h v"]:
    """Masked softmax of all pairs at once, the last `window` keys or all; heads before tokens, as above."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    t = q.shape[2]
    seen = _causal(t) if window is None else _causal(t) & ~_causal(t, window)
    s = jnp.einsum("bhtk,bhsk->bhts", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), -1)
    return jnp.swapaxes(jnp.einsum("bhts,bhsv->bhtv", weights, v), 1, 2)


def plain_long_conv(u: Float[Array, "b t d"], kernel: Float[Array, "t d"]) -> Float[Array, "b t d"]:
    """By FFT along time at twice the length."""
    t = u.shape[1]
    spectrum = jnp.fft.rfft(u, 2 * t, axis=1) * jnp.fft.rfft(kernel, 2 * t, axis=0)
    return jnp.fft.irfft(spectrum, 2 * t, axis=1)[:, :t]


def _causal(t: int, back: int = 0) -> Array:
    """[t, t], key at least `back` positions before the query."""
    index = jnp.arange(t)
    return index[:, None] >= index[None, :] + back


class Op(NamedTuple):
    """What an op is measured on."""

    forms: dict[str, Call]
    shapes: Callable[[int], tuple[tuple[int, ...], ...]]  # length -> shapes of the arguments
    what: str  # the sizes, for the table's title


def _heads(widths: Sequence[int]) -> Callable[[int], tuple[tuple[int, ...], ...]]:
    return lambda t: tuple((1, t, 4, width) for width in widths)


def _forms(op: Call, names: Sequence[str], plain: Call, **fixed: Any) -> dict[str, Call]:
    forms = {name: functools.partial(op, implementation=name, **fixed) for name in names}
    return {**forms, "plain": plain}


def make_op(name: str, window: int) -> Op:
    """The op, its implementations that are made for speed, and the plain form."""
    if name == "based":
        based = lambda *qkv, implementation: based_api.based(*qkv, implementation=implementation)[0]
        forms = _forms(based, ("chunked", "quadratic"), plain_based)
        return Op(forms, _heads((16, 16, 64)), "b=1, 4 heads, f=16, v=64")
    if name == "attention":
        forms = _forms(attention_api.attention, ("chunked", "quadratic"), plain_attention)
        forms["jax.nn"] = functools.partial(jax.nn.dot_product_attention, is_causal=True)
        return Op(forms, _heads((64, 64, 64)), "b=1, 4 heads, k=v=64")
    if name == "sliding_window":
        forms = _forms(
            sliding_window_api.sliding_window,
            ("chunked", "quadratic"),
            functools.partial(plain_attention, window=window),
            window=window,
        )
        return Op(forms, _heads((64, 64, 64)), f"b=1, 4 heads, k=v=64, window={window}")
    forms = _forms(long_conv_api.long_conv, ("fft", "direct"), plain_long_conv)
    return Op(forms, lambda t: ((4, t, 64), (t, 64)), "b=4, d=64, filter as long as the sequence")


class Compiled(NamedTuple):
    """A program with its arguments, and what it needs beside them."""

    call: Callable[[], Any]
    temporary: int  # bytes
    fits: bool


def compile_form(form: Call, arrays: Sequence[Array], backward: bool, limit: float) -> Compiled:
    """Forward, or every gradient of the sum of y times a fixed cotangent; never run where it needs more than `limit` bytes."""
    *given, cotangent = arrays
    scalar = lambda *xs: jnp.sum(form(*xs[:-1]) * xs[-1])
    if backward:
        function = jax.value_and_grad(scalar, argnums=tuple(range(len(given))))
        program = jax.jit(function).lower(*given, cotangent).compile()
        call = functools.partial(program, *given, cotangent)
    else:
        program = jax.jit(form).lower(*given).compile()
        call = functools.partial(program, *given)
    temporary = temporary_bytes(program)
    return Compiled(call, temporary, temporary <= limit)


def temporary_bytes(program: Any) -> int:
    """Bytes that a compiled program allocates beside its arguments and results; 0 where XLA does not say."""
    analysis = program.memory_analysis()
    return int(getattr(analysis, "temp_size_in_bytes", 0) or 0)


def measure_op(
    name: str,
    lengths: Sequence[int],
    repeats: int,
    memory_gib: float,
    window: int = 64,
    tick: Callable[[str], None] = lambda what: None,
    peer: Worker | None = None,
) -> dict[str, Any]:
    """{"op", "what", "rows": one per length, direction and form}; a row that did not fit has no "seconds".

    peer: a process of based_peer.py, whose rows have the form "torch".
    """
    op = make_op(name, window)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        key = jax.random.key(length)
        arrays = [
            jax.random.normal(jax.random.fold_in(key, i), shape)
            for i, shape in enumerate(op.shapes(length))
        ]
        result = jax.eval_shape(op.forms["plain"], *arrays)
        arrays.append(jax.random.normal(jax.random.fold_in(key, len(arrays)), result.shape))
        for backward in (False, True):
            direction = "forward+backward" if backward else "forward"
            tick(f"{name} {length} {direction}")
            programs = {
                form: compile_form(call, arrays, backward, memory_gib * GIB)
                for form, call in op.forms.items()
            }
            fitting = {form: p.call for form, p in programs.items() if p.fits}
            timed = take_turns(fitting, repeats)
            for form, program in programs.items():
                row = {"length": length, "direction": direction, "form": form}
                rows.append(row | {"temporary": program.temporary, **timed.get(form, {})})
            if peer:
                answer = peer.ask(length=length, backward=backward, calls=repeats + 1)
                seconds, processor = (answer[x][1:] for x in ("seconds", "processor"))
                row = {"length": length, "direction": direction, "form": "torch", "temporary": 0}
                rows.append(row | summarise(seconds, processor))
    result = {"op": name, "what": op.what, "dtype": "float32", "repeats": repeats, "rows": rows}
    return result | ({"peer": peer.ready} if peer else {})
