"""Geometry of the Hopper kernels: how features, states and segments are laid out for 64-row matrix instructions.

A token's features, in the order in which a kernel makes them, are groups of F numbers, F = 16 or 32 the padded width of q
and k:

    x_i x_(i+r mod F)   for r = 0 .. F/2,     x_i,     [1, 0 ...],     zeros up to a multiple of 64

and a slab is 64 of them. Every group but the last two is a roll of x times x. Keys carry the features as they are, queries
carry them times `weights`, so that the product of the two is 1 + s + s^2/2 with s = q . k / sqrt(f); a pair of roll F/2 is
listed twice, and weighs half. The packed state of `feature_map` has the same sums with a weight each, so a matrix with one
entry a row converts in either direction.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.based.feature_map import _pairs, expanded_width

CHUNK = 64  # tokens; the number of rows of a Hopper matrix instruction
WORKERS = 2  # warpgroups that compute outputs, next to the one that carries the state
SLAB = 64  # features; a slab of features is the left operand of the state's update


class Plan(NamedTuple):
    """The static description of a call."""

    b: int
    t: int  # as the kernel reads it: a multiple of 8, which the TMA wants
    h: int
    g: int
    f: int  # the width that the scale of the scores belongs to
    width: int  # F
    tile: int  # value columns of one CTA; their number times 2 bytes is the swizzle of every operand next to values
    tiles: int
    segmented: bool
    dtype: Any

    @property
    def chunks(self) -> int:
        return -(-self.t // CHUNK)

    @property
    def rolls(self) -> int:
        return self.width // 2 + 1

    @property
    def slabs(self) -> int:
        return -(-(self.rolls + 2) * self.width // SLAB)

    @property
    def rows(self) -> int:
        """Features, the zeros included."""
        return self.slabs * SLAB

    @property
    def groups(self) -> int:
        """Groups in a slab."""
        return SLAB // self.width

    def of_slab(self, slab: int) -> range:
        return range(slab * self.groups, (slab + 1) * self.groups)

    def halves(self, slab: int) -> tuple[range, range]:
        groups = self.of_slab(slab)
        return groups[: self.groups // 2], groups[self.groups // 2 :]

    @property
    def weights(self) -> tuple[float, ...]:
        """The factor of each group on the side of the queries; a zero marks a group of zeros."""
        rolls = [1 / (2 * self.f), *[1 / self.f] * (self.rolls - 2), 1 / (2 * self.f)]
        known = (*rolls, self.f**-0.5, 1.0)
        return known + (0.0,) * (self.slabs * self.groups - len(known))

    @property
    def stages(self) -> int:
        """Chunks of q, k, v (and dy) in shared memory."""
        return 4

    @property
    def ring(self) -> int:
        """Slabs of features that the warpgroup of the state holds at a time."""
        return 2 if self.width == 32 else 3


def padded_width(f: int) -> int:
    """F: 16 or 32."""
    return 16 if f <= 16 else 32


def plan_of(q: Any, k: Any, v: Any, ids: Any) -> Plan:
    """The plan for unpadded arguments, arrays or shapes."""
    b, t, h, f = q.shape
    width = padded_width(f)
    # Registers hold the state, 3 slabs of 64 columns or 10 of 16 in float32; shared memory holds it twice, narrow.
    widest = 64 if width == 16 else 16
    tile = next(n for n in (16, 32, 64) if n >= min(v.shape[3], widest))
    return Plan(
        b,
        -(-t // 8) * 8,
        h,
        k.shape[2],
        f,
        width,
        tile,
        -(-v.shape[3] // tile),
        ids is not None or t % CHUNK != 0,
        jnp.dtype(q.dtype),
    )


def pad_to(x: Array, t: int, width: int) -> Array:
    """x [b, t, h, w] with zeros up to t tokens and `width` columns; itself where nothing is missing."""
    missing = (t - x.shape[1], width - x.shape[3])
    return (
        x if missing == (0, 0) else jnp.pad(x, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))
    )


@functools.cache
def rolls_matrix(width: int) -> np.ndarray:
    """R [F, (F/2 + 1) F]: x R is roll 0, roll 1 ... of x, x_(i+r mod F) in column i of group r."""
    R = np.zeros((width, (width // 2 + 1) * width), np.float32)
    for r in range(width // 2 + 1):
        i = np.arange(width)
        R[(i + r) % width, r * width + i] = 1
    return R


@functools.cache
def one_column() -> np.ndarray:
    """[8, 64], the first row ones: the transposed right operand that sums over the tokens of a chunk."""
    ones = np.zeros((8, CHUNK), np.float32)
    ones[0] = 1
    return ones


@functools.cache
def _converters(f: int, width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(A, B): kernel rows = A packed rows, packed rows = B kernel rows; at most one entry a row in either."""
    e, rolls = expanded_width(f), width // 2 + 1
    linear, constant = rolls * width, (rolls + 1) * width
    A, B = np.zeros((rows, e), np.float32), np.zeros((e, rows), np.float32)
    A[constant, 0] = B[0, constant] = 1
    for i in range(f):
        A[linear + i, 1 + i], B[1 + i, linear + i] = f**0.25, f**-0.25
    for p, (i, j, weight) in enumerate(zip(*_pairs(f))):
        listed = [
            r * width + start
            for start, end in ((i, j), (j, i))
            if (r := (end - start) % width) <= width // 2
        ]
        for row in listed:
            A[row, 1 + f + p] = 1 / weight
        B[1 + f + p, listed[0]] = weight
    return A, B


def _multiply(M: np.ndarray, x: Float[Array, "b g i v"]) -> Float[Array, "b g j v"]:
    return jnp.einsum("ji,bgiv->bgjv", M, x, precision="highest")


def to_kernel(
    state: Float[Array, "b g e v1"], plan: Plan, *, cotangent: bool = False
) -> tuple[Float[Array, "b g tiles rows tile"], Float[Array, "b g rows"]]:
    """A packed state, or the cotangent of one, as the kernel's sums for the values and for the denominator."""
    A, B = _converters(plan.f, plan.width, plan.rows)
    rows = _multiply(B.T if cotangent else A, state)
    missing = plan.tiles * plan.tile - (rows.shape[-1] - 1)
    values = rows[..., :-1]
    if missing:
        values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, missing)))
    tiled = values.reshape(*values.shape[:-1], plan.tiles, plan.tile)
    return jnp.moveaxis(tiled, 3, 2), rows[..., -1]


def to_packed(
    values: Float[Array, "b g tiles rows tile"],
    denominator: Float[Array, "b g rows"],
    plan: Plan,
    v: int,
    *,
    cotangent: bool = False,
) -> Float[Array, "b g e v1"]:
    """The inverse of `to_kernel`, and its transpose for the cotangent of an initial state."""
    A, B = _converters(plan.f, plan.width, plan.rows)
    values = jnp.moveaxis(values, 2, 3)
    values = values.reshape(*values.shape[:3], -1)
    rows = jnp.concatenate([values[..., :v], denominator[..., None]], axis=-1)
    return _multiply(A.T if cotangent else B, rows)


IDS, READS, ADDS, KEEPS = range(4)


def segments(ids: Int[Array, "b t"] | None, plan: Plan, t: int) -> Int[Array, "b n 4 64"]:
    """What a chunk needs to know of its tokens' segments, 64 numbers each.

    IDS: the ids. READS: 1 where a token belongs to the segment of the state before the chunk. ADDS: 1 where it belongs to the
    segment of the state after it. KEEPS: 1, 64 times, where the two are the same, so that the state lives on.
    """
    if ids is None:
        ids = jnp.ones((plan.b, t), jnp.int32)
    ids = jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, plan.chunks * CHUNK - t)))
    ids = ids.reshape(plan.b, plan.chunks, CHUNK)
    after = jax.lax.cummax(jnp.max(ids, axis=2), axis=1)
    before = jnp.concatenate([ids[:, :1, 0], after[:, :-1]], axis=1)
    reads = ids == before[:, :, None]
    adds = (ids == after[:, :, None]) & (ids > 0)
    keeps = jnp.broadcast_to((before == after)[:, :, None], ids.shape)
    return jnp.stack([ids, *(x.astype(jnp.int32) for x in (reads, adds, keeps))], axis=2)
