"""What `python -m eval bench --op` measures: every form of an op, on which shapes, and the work that the op cannot avoid.

The `plain` forms are written here as a newcomer would, in a few lines of jnp: what an implementation has to beat.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eval.bench import roofline
from eval.bench.roofline import Work
from pallas_kernels.attention import api as attention_api
from pallas_kernels.attention.decode import attend_to_cache
from pallas_kernels.based import api as based_api
from pallas_kernels.based.feature_map import expanded_width
from pallas_kernels.based.prefix import prefix_based
from pallas_kernels.linear_attention import api as linear_attention_api
from pallas_kernels.long_conv import api as long_conv_api
from pallas_kernels.sliding_window import api as sliding_window_api

Call = Callable[..., Array]
Shapes = tuple[tuple[int, ...], ...]
DIRECTIONS = ("forward", "forward+backward", "decode")
HEAD = 64  # width of values, and of the keys of softmax attention
FEATURE = 16  # BASED's f


class Size(NamedTuple):
    """How large a measured call is. window: the keys that sliding_window sees."""

    length: int
    batch: int = 1
    heads: int = 4
    dtype: str = "float32"
    window: int = 64

    @property
    def bytes_per_element(self) -> int:
        return jnp.dtype(self.dtype).itemsize


class Form(NamedTuple):
    """One way to compute an op: a call on arrays of these shapes, and one token of decoding where there is such a thing.

    decode: size -> (step, carry): `step(carry, *arrays of one token) -> (carry, y)` after `length` tokens.
    """

    call: Call
    shapes: Callable[[Size], Shapes]
    decode: Callable[[Size], tuple[Callable[..., Any], Any]] | None = None


class Op(NamedTuple):
    """The forms of an op; the first two are ours, the linear and the quadratic one. what: the sizes, for a title."""

    what: Callable[[Size], str]
    forms: Callable[[Size], dict[str, Form]]
    work: Callable[[Size, str], Work | None]  # of a direction; None: not counted


def _causal(t: int, back: int = 0) -> Array:
    """[t, t], key at least `back` positions before the query."""
    index = jnp.arange(t)
    return index[:, None] >= index[None, :] + back


def plain_linear_attention(weights: Callable[[Array], Array], normalize: bool) -> Call:
    """Masked weights(q k^T) times v, all pairs at once, divided by their sum where normalize.

    Heads go before tokens first: the same products in the given layout take 2 to 4 times as long on a CPU.
    """

    def call(q, k, v, *log_decay):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        seen = _causal(q.shape[2])
        w = jnp.where(seen, weights(jnp.einsum("bhtf,bhsf->bhts", q, k)), 0)
        if log_decay:
            sums = jnp.cumsum(jnp.swapaxes(_decay(log_decay[0]), 1, 2), -1)
            w = w * jnp.exp(jnp.where(seen, sums[..., :, None] - sums[..., None, :], -jnp.inf))
        y = jnp.einsum("bhts,bhsv->bhtv", w, v)
        y = y / (jnp.sum(w, -1)[..., None] + 1e-12) if normalize else y
        return jnp.swapaxes(y, 1, 2)

    return call


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


def _decay(raw: Array) -> Array:
    """Random numbers as log decays: all negative, around -.1."""
    return -0.1 * jax.nn.softplus(raw)


def _heads(*widths: int) -> Callable[[Size], Shapes]:
    return lambda size: tuple((size.batch, size.length, size.heads, width) for width in widths)


def _kernels(**names: str) -> tuple[str, ...]:
    """The kernels of the platform that runs the benchmark: _kernels(gpu="gpu", tpu="tpu")."""
    name = names.get(jax.default_backend())
    return (name,) if name else ()


def _state_decode(op: Call, rows: Callable[[Size], int], columns: int) -> Callable[[Size], Any]:
    """Decoding from a state [b, h, rows, columns]; op(*token, initial_state) -> (y, state)."""

    def decode(size):
        def step(state, *token):
            y, state = op(*token, initial_state=state)
            return state, y

        return step, jnp.zeros((size.batch, size.heads, rows(size), columns), jnp.float32)

    return decode


def _cache_decode(slots: Callable[[Size], int]) -> Callable[[Size], Any]:
    """Decoding from a full cache of keys and values of the last `slots` tokens: one slot written, all of them read."""

    def decode(size):
        shape = (size.batch, slots(size), size.heads, HEAD)
        visible = jnp.ones(shape[:2], bool)

        def step(caches, q, k, v):
            slot = caches[2] % shape[1]
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(cache, new, slot, 1)
                for cache, new in zip(caches, (k, v))
            )
            return (keys, values, slot + 1), attend_to_cache(q, keys, values, visible)

        empty = jnp.zeros(shape, size.dtype)
        return step, (empty, empty, jnp.zeros((), jnp.int32))

    return decode


def _based(size: Size) -> dict[str, Form]:
    shapes = _heads(FEATURE, FEATURE, HEAD)
    form = lambda name: functools.partial(_first, based_api.based, implementation=name)
    taylor = lambda s: 1 + s * FEATURE**-0.5 * (1 + 0.5 * s * FEATURE**-0.5)
    decode = _state_decode(based_api.based, lambda _: expanded_width(FEATURE), HEAD + 1)
    names = ("chunked", "quadratic", *_kernels(gpu="gpu", tpu="tpu"))
    forms = {name: Form(form(name), shapes) for name in names}
    forms["chunked"] = forms["chunked"]._replace(decode=decode)
    forms["plain"] = Form(plain_linear_attention(taylor, normalize=True), shapes)
    forms["prefix"] = Form(_half_prefix, lambda size: shapes(size) + shapes(_half(size))[1:])
    softmax = Form(attention_api.attention, _heads(HEAD, HEAD, HEAD), _cache_decode(_all_tokens))
    return {**forms, "softmax": softmax}


def _half_prefix(*arrays: Array) -> Array:
    """JRT's prefix form, its encoder over the first half of the tokens."""
    b, m = arrays[-1].shape[:2]
    return prefix_based(*arrays, prefix_length=jnp.full(b, m, jnp.int32))[0]


def _half(size: Size) -> Size:
    return size._replace(length=size.length // 2)


def _linear_attention(size: Size) -> dict[str, Form]:
    """One log decay per head and token, as in Mamba-2."""

    def shapes(size):
        return (*_heads(HEAD, HEAD, HEAD)(size), (size.batch, size.length, size.heads))

    def op(q, k, v, raw, **given):
        return linear_attention_api.linear_attention(q, k, v, log_decay=_decay(raw), **given)

    form = lambda name: functools.partial(_first, op, implementation=name)
    forms = {name: Form(form(name), shapes) for name in ("chunked", "quadratic")}
    decode = _state_decode(op, lambda _: HEAD, HEAD)
    forms["chunked"] = forms["chunked"]._replace(decode=decode)
    return {**forms, "plain": Form(plain_linear_attention(lambda s: s, normalize=False), shapes)}


def _attention(size: Size) -> dict[str, Form]:
    names = ("chunked", "quadratic", *_kernels(gpu="cudnn", tpu="splash"))
    calls: dict[str, Call] = {
        name: functools.partial(attention_api.attention, implementation=name) for name in names
    }
    calls["plain"] = plain_attention
    calls["jax.nn"] = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    forms = {name: Form(call, _heads(HEAD, HEAD, HEAD)) for name, call in calls.items()}
    forms["chunked"] = forms["chunked"]._replace(decode=_cache_decode(_all_tokens))
    return forms


def _sliding_window(size: Size) -> dict[str, Form]:
    names = ("chunked", "quadratic", *_kernels(gpu="cudnn", tpu="splash"))
    fixed = {"window": size.window}
    calls: dict[str, Call] = {
        name: functools.partial(sliding_window_api.sliding_window, implementation=name, **fixed)
        for name in names
    }
    calls["plain"] = functools.partial(plain_attention, **fixed)
    forms = {name: Form(call, _heads(HEAD, HEAD, HEAD)) for name, call in calls.items()}
    decode = _cache_decode(lambda size: min(size.window, size.length))
    forms["chunked"] = forms["chunked"]._replace(decode=decode)
    return forms


def _long_conv(size: Size) -> dict[str, Form]:
    def shapes(size):
        d = HEAD * size.heads
        return (size.batch, size.length, d), (size.length, d)

    calls: dict[str, Call] = {
        name: functools.partial(long_conv_api.long_conv, implementation=name)
        for name in ("fft", "direct")
    }
    return {name: Form(call, shapes) for name, call in (calls | {"plain": plain_long_conv}).items()}


def _first(op: Callable[..., tuple[Array, Any]], *args: Any, **given: Any) -> Array:
    return op(*args, **given)[0]


def _all_tokens(size: Size) -> int:
    return size.length


def _based_work(size: Size, direction: str) -> Work:
    call = _counted(size)
    if direction == "decode":
        return roofline.based_decode(call)
    forward = roofline.based_forward(call)
    return forward if direction == "forward" else forward.and_then(roofline.based_backward(call))


def _counted(size: Size) -> roofline.Call:
    h = size.heads
    widths = {"f": FEATURE, "v": HEAD, "element": size.bytes_per_element}
    return roofline.Call(size.batch, size.length, h, h, **widths)


def _attention_work(size: Size, direction: str) -> Work:
    return _softmax_work(size, direction, size.length)


def _window_work(size: Size, direction: str) -> Work:
    return _softmax_work(size, direction, min(size.window, size.length))


def _softmax_work(size: Size, direction: str, keys: int) -> Work:
    """Two products per query and key, of which each query of a full window sees half; backward makes five of two."""
    pairs = size.batch * size.heads
    if direction == "decode":
        moved = pairs * 2 * keys * HEAD * size.bytes_per_element
        return Work(pairs * keys * 4 * HEAD, moved)
    seen = sum_of_keys(size.length, keys)
    moved = pairs * size.length * 4 * HEAD * size.bytes_per_element
    forward = Work(pairs * seen * 4 * HEAD, moved)
    return forward if direction == "forward" else Work(3.5 * forward.flops, 3 * moved)


def sum_of_keys(t: int, window: int) -> int:
    """How many (query, key) pairs t queries see that look back over `window` keys, their own included."""
    w = min(t, window)
    return w * (w + 1) // 2 + (t - w) * w


def _linear_work(size: Size, direction: str, chunk: int = 64) -> Work:
    """Half of each chunk's square twice, the state read and written once per token; backward: five of two, six of two."""
    tokens = size.batch * size.heads * size.length
    element, state = size.bytes_per_element, 4 * HEAD * HEAD
    if direction == "decode":
        rows = size.batch * size.heads
        return Work(rows * state, rows * (2 * 4 * HEAD * HEAD + 4 * HEAD * element))
    forward = Work(tokens * (2 * chunk * HEAD + state), tokens * (4 * HEAD + 1) * element)
    if direction == "forward":
        return forward
    flops = tokens * (7 * chunk * HEAD + 4 * state)
    return Work(flops, 3 * forward.bytes)


def _conv_work(size: Size, direction: str) -> Work | None:
    """Real FFTs of twice the length, 2.5 n log2 n each: two and an inverse per channel, the filter's once per batch."""
    if direction == "decode":
        return None
    d, n = HEAD * size.heads, 2 * size.length
    one = 2.5 * n * math.log2(n) if n > 1 else 1.0
    flops = d * one * (2 * size.batch + 1) + 6 * d * n * size.batch / 2
    moved = d * size.length * (2 * size.batch + 1) * size.bytes_per_element
    forward = Work(flops, moved)
    return forward if direction == "forward" else Work(3 * flops, 3 * moved)


def _rows(size: Size) -> str:
    return f"b={size.batch}, {size.heads} heads"


OPS: dict[str, Op] = {
    "based": Op(lambda s: f"{_rows(s)}, f={FEATURE}, v={HEAD}", _based, _based_work),
    "linear_attention": Op(
        lambda s: f"{_rows(s)}, k=v={HEAD}, decay per head", _linear_attention, _linear_work
    ),
    "attention": Op(lambda s: f"{_rows(s)}, k=v={HEAD}", _attention, _attention_work),
    "sliding_window": Op(
        lambda s: f"{_rows(s)}, k=v={HEAD}, window={s.window}", _sliding_window, _window_work
    ),
    "long_conv": Op(
        lambda s: f"b={s.batch}, d={HEAD * s.heads}, filter as long as the sequence",
        _long_conv,
        _conv_work,
    ),
}
