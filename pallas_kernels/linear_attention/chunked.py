"""The engine: a scan over chunks that carries the state, with gradients that keep one state per chunk and none per token.

`pallas_kernels.based` gives it the Taylor map; decays make it RetNet, GLA and Mamba-2. With a chunk as long as the sequence
there is no scan, and it is the quadratic form.

The backward pass runs the states forward once more, keeps the one before every chunk, and sweeps the chunks in reverse with the
gradient of the state. Inside a chunk everything is computed again: for a scan the memory is what q, k, v, y, their gradients
and the chunk states take.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.linear_attention.decay import SUBCHUNK
from pallas_kernels.linear_attention.one_chunk import Map, Turned, Where, read, update
from pallas_kernels.linear_attention.varying import varying_like

Arrays = Any  # nested tuples of arrays and None


class Law(NamedTuple):
    """What is computed. `ones`: the values get a last column of ones, whose sums are the denominators."""

    phi: Map
    ones: bool
    normalize: bool
    epsilon: float


def forward(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    log_decay: Float[Array, "b t g *k"] | None,
    state: Float[Array, "b g e w"] | None,
    ids: Int[Array, "b t"] | None,
    *,
    law: Law,
    chunk: int,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b t h"] | None, Float[Array, "b g e w"]]:
    """y, the denominators (None without `ones`) and the final state; padding arrives as zeros in q, k, v and log_decay."""
    pieces = _Pieces(q, k, v, log_decay, ids, chunk)

    def body(state, piece):
        tokens, where = piece
        turned = _turn(tokens, law)
        y, den = _finish(read(turned, state, where, law.phi), tokens, law)
        return update(turned, state, where, law.phi), (y, den)

    if pieces.count == 1:
        final, (y, den) = body(state, pieces.only())
    else:
        final, (y, den) = jax.lax.scan(body, pieces.carry(state, law), pieces.all())
        y, den = pieces.join((y, den))
    return *pieces.cut((y, den)), final


def final_state(
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    log_decay: Float[Array, "b t g *k"] | None,
    state: Float[Array, "b g e w"] | None,
    ids: Int[Array, "b t"] | None,
    *,
    law: Law,
    chunk: int,
) -> Float[Array, "b g e w"]:
    """The state after all tokens, without reading it anywhere. Its gradient keeps nothing of a chunk."""
    pieces = _Pieces(k, k, v, log_decay, ids, chunk)

    @jax.checkpoint
    def body(state, piece):
        tokens, where = piece
        return update(_turn(tokens, law), state, where, law.phi), None

    if pieces.count == 1:
        return body(state, pieces.only())[0]
    return jax.lax.scan(body, pieces.carry(state, law), pieces.all())[0]


def backward(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    log_decay: Float[Array, "b t g *k"] | None,
    state: Float[Array, "b g e w"] | None,
    ids: Int[Array, "b t"] | None,
    y: Float[Array, "b t h v"],
    den: Float[Array, "b t h"] | None,
    dy: Float[Array, "b t h v"],
    dstate: Float[Array, "b g e w"] | None,
    *,
    law: Law,
    chunk: int,
) -> tuple[Arrays, Arrays, Arrays, Arrays, Arrays]:
    """Gradients of q, k, v, log_decay and the initial state (None for what was None), from those of y and the final state."""
    pieces = _Pieces(q, k, v, log_decay, ids, chunk)

    def body(dafter, piece):
        (tokens, where), outputs, before = piece
        y, den, dy = outputs
        dout = output_gradient(y, den, dy, tokens.real, law)
        dout = _grouped(dout.astype(jnp.promote_types(q.dtype, jnp.float32)), k.shape[2])

        def both(q, k, v, log_decay, state):
            turned = _turn(Tokens(q, k, v, log_decay, tokens.real), law)
            out = read(turned, state, where, law.phi)
            # Where nothing depends on the final state its gradient is None, and the update is left out.
            return out, None if dafter is None else update(turned, state, where, law.phi)

        _, transposed = jax.vjp(both, *tokens[:4], before)
        *dtokens, dbefore = transposed((dout, dafter))
        return dbefore, tuple(dtokens)

    if pieces.count == 1:
        outputs = pieces.pad((y, den, dy))
        dbefore, dtokens = body(dstate, (pieces.only(), outputs, state))
    else:
        carry = pieces.carry(state, law)
        advance = lambda state, piece: update(_turn(piece[0], law), state, piece[1], law.phi)
        keep = lambda state, piece: (advance(state, piece), state)
        _, starts = jax.lax.scan(keep, carry, pieces.all())
        outputs = pieces.split((y, den, dy))
        last = varying_like(jnp.zeros_like(carry), (carry, dy)) if dstate is None else dstate
        dbefore, dtokens = jax.lax.scan(
            body, varying_like(last, (q, dy)), (pieces.all(), outputs, starts), reverse=True
        )
        dtokens = pieces.join(dtokens)
    return *pieces.cut(dtokens), None if state is None else dbefore


class Tokens(NamedTuple):
    """The tokens of one chunk; `real` is None where all of them are."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    real: Any


class _Pieces:
    """The arrays of a call cut into chunks; the last one is filled with rows of zeros that are not real."""

    def __init__(self, q, k, v, log_decay, ids, chunk):
        b, self.length = q.shape[:2]
        channels = log_decay is not None and log_decay.ndim == 4
        multiple = SUBCHUNK if channels else 1
        self.chunk = -(-min(chunk, self.length) // multiple) * multiple
        self.count = -(-self.length // self.chunk)
        self.padded = self.count * self.chunk
        real = None if ids is None else ids > 0
        if real is None and self.padded != self.length:
            real = jnp.ones((b, self.length), bool)
        self.tokens = self.pad(Tokens(q, k, v, log_decay, real))
        self.ids = self.pad(ids)
        self.heads = k.shape[2]
        self.like = (q, k, v, log_decay, ids)

    def pad(self, arrays: Arrays) -> Arrays:
        grow = lambda x: jnp.pad(
            x, [(0, 0), (0, self.padded - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        )
        return arrays if self.padded == self.length else jax.tree.map(grow, arrays)

    def cut(self, arrays: Arrays) -> Arrays:
        return jax.tree.map(lambda x: x[:, : self.length], arrays)

    def split(self, arrays: Arrays) -> Arrays:
        """[b, t, ...] to [chunks, b, chunk, ...]."""
        shape = lambda x: x.reshape(x.shape[0], self.count, self.chunk, *x.shape[2:])
        return jax.tree.map(lambda x: jnp.moveaxis(shape(x), 1, 0), self.pad(arrays))

    def join(self, arrays: Arrays) -> Arrays:
        def back(x):
            x = jnp.moveaxis(x, 0, 1)
            return x.reshape(x.shape[0], self.padded, *x.shape[3:])

        return jax.tree.map(back, arrays)

    def only(self) -> tuple[Tokens, Where | None]:
        """The chunk of a sequence that is one."""
        if self.ids is None:
            return self.tokens, None
        first = self.ids[:, 0]
        return self.tokens, Where(self.ids, first, jnp.maximum(first, jnp.max(self.ids, axis=1)))

    def all(self) -> tuple[Tokens, Where | None]:
        """Every chunk, for a scan."""
        tokens = self.split(self.tokens)
        if self.ids is None:
            return tokens, None
        ids = self.split(self.ids)
        after = jax.lax.cummax(jnp.max(ids, axis=2), axis=0)
        before = jnp.concatenate([self.ids[None, :, 0], after[:-1]])
        return tokens, Where(ids, before, after)

    def carry(self, state: Arrays, law: Law) -> Array:
        """The state before the first chunk, as a scan wants it."""
        q, k, v = self.tokens[:3]
        acc = jnp.promote_types(q.dtype, jnp.float32)
        if state is None:
            width = jax.eval_shape(law.phi.features, k).shape[-1]
            state = jnp.zeros((q.shape[0], self.heads, width, v.shape[-1] + law.ones), acc)
        return varying_like(state, self.like)


def _turn(tokens: Tokens, law: Law) -> Turned:
    """Heads before tokens, queries by group, values wide and with their ones."""
    q, k, v, log_decay, real = tokens
    b, t, g = k.shape[:3]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    v = v.astype(acc)
    if law.ones:
        ones = jnp.ones((b, t), acc) if real is None else real.astype(acc)
        ones = jnp.broadcast_to(ones[..., None, None], v.shape[:-1] + (1,))
        v = jnp.concatenate([v, ones], axis=-1)
    q = _grouped(q, g)
    k, v = jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)
    if log_decay is not None:
        log_decay = jnp.moveaxis(log_decay.astype(acc), 2, 1)
    return Turned(q, k, v, log_decay)


def _grouped(x: Float[Array, "b t h w"], g: int) -> Float[Array, "b g r t w"]:
    return jnp.moveaxis(x.reshape(*x.shape[:2], g, -1, x.shape[3]), 1, 3)


def _finish(out: Float[Array, "b g r t w"], tokens: Tokens, law: Law) -> tuple[Array, Arrays]:
    """y in the dtype and layout of v, and the denominators."""
    b, g, r, t, _ = out.shape
    out = jnp.moveaxis(out, 3, 1).reshape(b, t, g * r, -1)
    if not law.ones:
        return out.astype(tokens.v.dtype), None
    num, den = out[..., :-1], out[..., -1]
    if tokens.real is not None:
        num = jnp.where(tokens.real[..., None, None], num, 0)
        den = jnp.where(tokens.real[..., None], den, 1)
    y = num / (den + law.epsilon)[..., None] if law.normalize else num
    return y.astype(tokens.v.dtype), den


def output_gradient(
    y: Float[Array, "b t h v"],
    den: Float[Array, "b t h"] | None,
    dy: Float[Array, "b t h v"],
    real: Bool[Array, "b t"] | None,
    law: Law,
) -> Float[Array, "b t h w"]:
    """The gradient of numerators and denominators: dy / (den + epsilon), and -(dy . y) / (den + epsilon)."""
    dy = dy.astype(jnp.promote_types(dy.dtype, jnp.float32))
    if real is not None:
        dy = jnp.where(real[..., None, None], dy, 0)
    if not law.ones:
        return dy
    dden = jnp.zeros_like(dy[..., :1])
    if law.normalize and den is not None:
        # Rows that fill a chunk have a denominator of zero.
        den = den if real is None else jnp.where(real[..., None], den, 1)
        dy = dy / (den + law.epsilon)[..., None]
        dden = -jnp.sum(dy * y.astype(dy.dtype), axis=-1, keepdims=True)
    return jnp.concatenate([dy, dden], axis=-1)
