"""Shapes of the TPU kernels: padded widths, blocks, memory, and the aligned layout of the state.

A grid step holds `block` tokens of `groups` key/value heads and their query heads; inside it tokens lie on lanes, and
features and values on sublanes. Features come by rolls of all F rows, F being f rounded up to whole sublane tiles:

    [x (F rows),  x * roll(x, r) for r = 0 .. F/2 (F rows each),  1, 0, ..., 0 (16 rows)]          E = F (F/2 + 2) + 16

so that no tile is ragged. The last roll lists its pairs twice, with weights that make up for it. Values get 16 more rows,
of which the first holds ones: the denominator. The public layout is packed (`feature_map`); since both lists of products
have the same inner products, the change of layout is an isometry, and gradients of states convert as states do.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.based.feature_map import _pairs, expanded_width

EXTRA = 16  # rows after the values, and after the products: one is in use, a bfloat16 tile has 16
CHUNK = 128  # tokens whose weights are formed at once: the lanes of a tile
BLOCKS = (512, 256, 128)  # tokens per grid step
TOGETHER = 8  # chunks of heads in one basic block of a kernel
HEADS = 8  # query heads per grid step, if they divide so
COMFORTABLE = 16 * 2**20  # VMEM of a kernel, if fewer heads per step can bring it down to that
WIDEST_F, WIDEST_V = 32, 128
MEMORY_LIMIT = 40 * 2**20  # of 64 MiB on the smallest of today's chips


class Plan(NamedTuple):
    """Sizes of a call. Letters as in the op; capitals are padded. `groups`: key/value heads of a grid step."""

    b: int
    t: int
    h: int
    g: int
    f: int
    v: int
    dtype: jnp.dtype
    groups: int
    block: int
    masked: bool  # some tokens are not real or change the segment: ids are given

    @property
    def shared(self) -> int:
        """Query heads per key/value head."""
        return self.h // self.g

    @property
    def heads(self) -> int:
        """Query heads of a grid step."""
        return self.groups * self.shared

    @property
    def F(self) -> int:
        return round_up(self.f, 8)

    @property
    def V(self) -> int:
        return round_up(self.v, 16)

    @property
    def V1(self) -> int:
        return self.V + EXTRA

    @property
    def E(self) -> int:
        return self.F * (self.F // 2 + 2) + EXTRA

    @property
    def steps(self) -> int:
        """Grid steps along the sequence."""
        return -(-self.t // self.block)

    @property
    def chunks(self) -> int:
        """Chunks of a grid step."""
        return self.block // CHUNK

    @property
    def heads_together(self) -> int:
        """Query heads whose instructions are interleaved. A float32 product is six of bfloat16: they fill the gaps too."""
        return TOGETHER * 2 // self.dtype.itemsize // self.chunks

    @property
    def groups_together(self) -> int:
        """Key/value heads of those."""
        return divisor_up_to(self.groups, self.heads_together // self.shared)

    @property
    def members_together(self) -> int:
        """Query heads of each."""
        return divisor_up_to(self.shared, self.heads_together)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.b, self.g // self.groups, self.steps


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def divisor_up_to(n: int, most: int) -> int:
    """The largest divisor of n that is not above `most`; 1 if there is none."""
    return next((d for d in range(min(n, most), 1, -1) if n % d == 0), 1)


def make_plan(q, k, v, ids) -> Plan:
    """The plan of a call, by its shapes: long blocks unless they pad the sequence by more than an eighth."""
    (b, t, h, f), (g, width) = q.shape, v.shape[2:]
    block = next((n for n in BLOCKS if -t % n <= t // 8), CHUNK)
    masked = ids is not None or t % block != 0
    groups = divisor_up_to(g, HEADS * g // h)
    plan = Plan(b, t, h, g, f, width, jnp.dtype(q.dtype), groups, block, masked)
    while plan.groups > 1 and memory_estimate(plan) > COMFORTABLE:
        plan = plan._replace(groups=divisor_up_to(g, plan.groups - 1))
    return plan


def memory_estimate(plan: Plan) -> int:
    """Bytes of VMEM of the largest kernel, the reverse sweep: blocks and states twice, scratch once, and what it spills."""
    tokens = plan.dtype.itemsize * plan.block * (plan.heads + 2 * plan.groups) * (plan.F + plan.V)
    rows = 2 * 4 * plan.block * plan.heads * 8
    state = 4 * plan.groups * plan.E * round_up(plan.V1, 128)
    weights = 4 * CHUNK * CHUNK * 4 * TOGETHER
    return 2 * (tokens + rows + 2 * state) + state + weights


@functools.cache
def _alignment(f: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For every aligned row its packed row (-1: zeros) and weight; for every packed row one aligned row, and 1 / weight."""
    F = round_up(f, 8)
    left, right, _ = _pairs(f)
    packed = {frozenset((int(i), int(j))): 1 + f + n for n, (i, j) in enumerate(zip(left, right))}
    source, weight = np.full(F * (F // 2 + 2) + EXTRA, -1), np.ones(F * (F // 2 + 2) + EXTRA)
    source[:f] = 1 + np.arange(f)
    for r in range(F // 2 + 1):
        for i in range(F):
            j = (i - r) % F
            if i < f and j < f:
                row = F + r * F + i
                source[row] = packed[frozenset((i, j))]
                weight[row] = 0.5**0.5 if 2 * r == F else 1
    source[-EXTRA] = 0
    target = np.zeros(expanded_width(f), int)
    # Backwards, so that of the two places of a pair in the last roll the first one stays.
    used = np.flatnonzero(source >= 0)[::-1]
    target[source[used]] = used
    return source, weight, target, 1 / weight[target]


def _take_rows(x: jax.Array, index: np.ndarray, weight: np.ndarray) -> jax.Array:
    """Rows `index` of axis 2, times `weight`; zeros for -1. By slices of neighbours: TPUs gather slowly."""
    a, b = index[:-1], index[1:]
    together = np.where((a < 0) | (b < 0), a == b, b == a + 1)
    runs = np.split(index, np.flatnonzero(~together) + 1)
    zeros = lambda n: jnp.zeros((*x.shape[:2], n, x.shape[3]), x.dtype)
    parts = [zeros(len(r)) if r[0] < 0 else x[:, :, r[0] : r[-1] + 1] for r in runs]
    return jnp.concatenate(parts, axis=2) * jnp.asarray(weight, x.dtype)[:, None]


def align_state(state: Float[Array, "b g e v1"], f: int) -> Float[Array, "b g E V1"]:
    """A packed state, or its cotangent, in the layout of the kernels."""
    v = state.shape[-1] - 1
    rows = _take_rows(state, *_alignment(f)[:2])
    values = jnp.pad(rows[..., :v], [(0, 0)] * 3 + [(0, round_up(v, 16) - v)])
    ones = jnp.pad(rows[..., v:], [(0, 0)] * 3 + [(0, EXTRA - 1)])
    return jnp.concatenate([values, ones], axis=-1)


def pack_aligned(state: Float[Array, "b g E V1"], f: int, v: int) -> Float[Array, "b g e v1"]:
    """The inverse of `align_state`."""
    rows = _take_rows(state, *_alignment(f)[2:])
    ones = state.shape[-1] - EXTRA
    return jnp.concatenate([rows[..., :v], rows[..., ones : ones + 1]], axis=-1)


def tokens_last(x: Float[Array, "b t n w"], width: int) -> Float[Array, "b n width T"]:
    """Heads, width, tokens: how XLA lays out [b, t, n, w] of few and narrow heads anyway, so that no copy is made.

    Padded where the width is ragged or the sequence shorter than a chunk.
    """
    t, w = x.shape[1], x.shape[3]
    x = jnp.transpose(x, (0, 2, 3, 1))
    if w != width or t < CHUNK:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, width - w), (0, max(0, CHUNK - t))])
    return x


def tokens_second(x: Float[Array, "b n w T"], t: int, width: int) -> Float[Array, "b t n width"]:
    """The inverse of `tokens_last`."""
    return jnp.transpose(x[:, :, :width, :t], (0, 3, 1, 2))


def marks_of(ids: jax.Array | None, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Ids [b, 1, steps * block] padded by zeros, and [b, 2, chunks]: the segment that holds the state before and after."""
    if ids is None:
        ids = jnp.ones((plan.b, plan.t), jnp.int32)
    ids = ids.astype(jnp.int32)
    ids = jnp.pad(ids, [(0, 0), (0, plan.steps * plan.block - plan.t)])
    highest = ids.reshape(plan.b, -1, CHUNK).max(axis=-1)
    # The first token's segment holds the initial state; where that token is padding the row is.
    after = jax.lax.cummax(highest, axis=1)
    before = jnp.concatenate([ids[:, :1], after[:, :-1]], axis=1)
    return ids[:, None, :], jnp.stack([before, after], axis=1)
