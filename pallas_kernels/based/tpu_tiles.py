"""What the TPU kernels do with one tile: features by rolls, products on the matrix unit, masks. Tokens lie on lanes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.based.tpu_layout import CHUNK, EXTRA, Plan


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product over axis contract[0] of x and contract[1] of y: (1, 0) is x y, (1, 1) x y^T, (0, 0) x^T y."""
    return jax.lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _roll_weights(F: int, f: int) -> list[float]:
    """Squares count half, and the last roll lists its pairs twice."""
    return [(0.5 if r in (0, F // 2) else 1.0) ** 0.5 * f**-0.5 for r in range(F // 2 + 1)]


def features(x: jax.Array, f: int) -> jax.Array:
    """phi(x)^T [E, C] of x^T [F, C] in the aligned layout, in x's dtype; formed in float32."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    F, tokens = x.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (EXTRA, tokens), 0)
    rolls = [x * w * (pltpu.roll(x, r, 0) if r else x) for r, w in enumerate(_roll_weights(F, f))]
    one = jnp.where(row == 0, 1.0, 0.0)
    return jnp.concatenate([x * f**-0.25, *rolls, one], axis=0).astype(dtype)


def features_transposed(x: jax.Array, d: jax.Array, f: int) -> jax.Array:
    """The gradient of sum(phi(x) * d) by x: [F, C] float32, of d [E, C] float32."""
    x = x.astype(jnp.float32)
    F = x.shape[0]
    dx = d[:F] * f**-0.25
    for r, w in enumerate(_roll_weights(F, f)):
        g = d[F + r * F : F + (r + 1) * F] * w
        if r == 0:
            dx += 2 * g * x
        else:
            dx += g * pltpu.roll(x, r, 0) + pltpu.roll(g * x, F - r, 0)
    return dx


def weights_of(d: jax.Array, f: int, seen: jax.Array, dtype: Any) -> jax.Array:
    """1 + s + s^2/2 where `seen`, s = d / sqrt(f); rounded once, after the polynomial."""
    return jnp.where(seen, 1 + d * (f**-0.5 + d * (0.5 / f)), 0).astype(dtype)


def scores_transposed(dw: jax.Array, d: jax.Array, f: int, seen: jax.Array) -> jax.Array:
    """The gradient by d of sum(weights_of(d) * dw), not yet rounded."""
    return jnp.where(seen, dw * (f**-0.5 + d * (1 / f)), 0)


def with_row(x: jax.Array, row: jax.Array | float) -> jax.Array:
    """[x; row; 0 ...]: EXTRA more rows, of which the first is `row` [1, C]; in x's dtype."""
    index = jax.lax.broadcasted_iota(jnp.int32, (EXTRA, x.shape[1]), 0)
    below = jnp.where(index == 0, row, jnp.float32(0))
    return jnp.concatenate([x, below.astype(x.dtype)], axis=0)


class Chunk(NamedTuple):
    """CHUNK tokens of a grid step: where they are, and what they may see. The last four are None where all tokens are
    real and of one segment; rows are [1, C]."""

    lanes: slice
    seen: jax.Array  # [keys, queries]: whether the query sees the key
    real: jax.Array | None  # row: not padding
    reads: jax.Array | None  # row: in the segment whose state the chunk begins with
    stays: jax.Array | None  # row: in the segment whose state the chunk ends with
    keep: jax.Array | None  # 1.0 where those are one segment, else 0.0

    def clean(self, x: jax.Array) -> jax.Array:
        """x [rows, C] without what stands where no token is: a product with zero would keep a NaN."""
        return self._where(self.real, x)

    def readers(self, x: jax.Array) -> jax.Array:
        """x where a token reads the state before the chunk, else 0."""
        return self._where(self.reads, x)

    def stayers(self, x: jax.Array) -> jax.Array:
        """x where a token is in the state after the chunk, else 0."""
        return self._where(self.stays, x)

    def kept(self, state: jax.Array) -> jax.Array:
        """What remains of the state, or of its cotangent, across the chunk."""
        return state if self.keep is None else state * self.keep

    def inverse(self, den: jax.Array, epsilon: float) -> jax.Array:
        """1 / (den + epsilon) of [1, C], 1 where no token is."""
        divisor = den + epsilon
        return 1 / (divisor if self.real is None else jnp.where(self.real, divisor, 1))

    def with_ones(self, v: jax.Array) -> jax.Array:
        """[v; 1; 0 ...] [V1, C], the one only where a token is: the values and what they count."""
        return with_row(v, 1.0 if self.real is None else self.real.astype(jnp.float32))

    def _where(self, mask: jax.Array | None, x: jax.Array) -> jax.Array:
        if mask is None:
            return x
        # A mask of 32-bit rows selects 32-bit values.
        return jnp.where(mask, x.astype(jnp.float32), 0).astype(x.dtype)


def chunks_of(given: dict[str, Any], plan: Plan, step: jax.Array) -> list[Chunk]:
    """The chunks of the block of tokens `step`, in order."""
    key = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0)
    query = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    causal = key <= query
    chunks = []
    for c in range(plan.chunks):
        lanes = slice(c * CHUNK, (c + 1) * CHUNK)
        if not plan.masked:
            chunks.append(Chunk(lanes, causal, None, None, None, None))
            continue
        ids = given["ids"][0, :, lanes]
        before, after = (given["marks"][0, i, step * plan.chunks + c] for i in (0, 1))
        real = ids > 0
        of_query = jnp.broadcast_to(ids, (CHUNK, CHUNK))
        of_key = jnp.transpose(of_query)
        seen = causal & (of_query == of_key) & (of_key > 0)
        keep = (before == after).astype(jnp.float32)
        chunks.append(Chunk(lanes, seen, real, real & (ids == before), real & (ids == after), keep))
    return chunks


class Unit(NamedTuple):
    """A query head and a chunk of a grid step; n counts the pairs of key/value head and chunk."""

    head: Any
    chunk: Chunk
    n: int


class Keys(NamedTuple):
    """Key/value heads of a grid step, whose instructions are interleaved; lists by `n`, head by head."""

    groups: list[Any]
    chunks: list[Chunk]
    k: list[jax.Array]  # [F, C]
    v1: list[jax.Array]  # [V1, C]: values and ones

    def units(self, members: list[Any], shared: int) -> list[Unit]:
        """All chunks of the query heads `members` of every group."""
        return [
            Unit(group * shared + member, chunk, i * len(self.chunks) + c)
            for i, group in enumerate(self.groups)
            for member in members
            for c, chunk in enumerate(self.chunks)
        ]

    def advance(self, state: Any, update: Callable[[jax.Array, jax.Array], jax.Array], dtype: Any):
        """The state before every chunk, in `dtype`; the reference `state` holds that after the last. update(k, v1) is what
        a chunk adds."""
        chunks = self.chunks * len(self.groups)
        updates = [update(k, c.stayers(v1)) for k, v1, c in zip(self.k, self.v1, chunks)]
        before = []
        for i, group in enumerate(self.groups):
            now = state[group]
            for c, chunk in enumerate(self.chunks):
                before.append(now.astype(dtype))
                now = chunk.kept(now) + updates[i * len(self.chunks) + c]
            state[group] = now
        return before


def tile(reference: Any, head: Any, chunk: Chunk) -> jax.Array:
    """[width, C] of the block [1, heads, width, tokens], zero where no token is."""
    return chunk.clean(reference[0, head, :, chunk.lanes])


def read_keys(given: dict[str, Any], groups: list[Any], chunks: list[Chunk]) -> Keys:
    pairs = [(group, chunk) for group in groups for chunk in chunks]
    k = [tile(given["k"], *pair) for pair in pairs]
    v1 = [chunk.with_ones(tile(given["v"], group, chunk)) for group, chunk in pairs]
    return Keys(groups, chunks, k, v1)


def for_each(n: int, size: int, body: Callable[[list[Any]], None]) -> None:
    """body of the indices 0 .. n - 1, `size` at a time: a list is one basic block, and its parts are interleaved."""
    accumulate(n, size, lambda these, _: body(these), None)


def accumulate(n: int, size: int, body: Callable[[list[Any], Any], Any], start: Any) -> Any:
    """As `for_each`, with a value that goes from each body to the next."""
    if n == size:
        return body(list(range(n)), start)
    first = lambda i: [i * size + j for j in range(size)]
    return jax.lax.fori_loop(0, n // size, lambda i, carry: body(first(i), carry), start)
