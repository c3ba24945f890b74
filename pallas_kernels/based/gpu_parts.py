"""What the Hopper kernels share: loads, products, features and masks inside a warpgroup.

Rules that every kernel here keeps (the reference of this repository, sections 2.2 and 4.5, has what happens otherwise):
- Both operands of a product lie in shared memory and an accumulator starts at zero: the interpreter runs nothing else.
- An accumulator is read once, behind a barrier for the compiler: without it arithmetic may move before the wait.
- What a warpgroup has written becomes visible to the matrix unit by `commit_smem`, which also makes its warps meet. A buffer
  that a product has read is written again only after its accumulator was read and the warps have met since.
- All warpgroups meet before the kernel ends.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.based.gpu_layout import CHUNK, IDS, SLAB, Plan

MATRIX = (
    plgpu.Layout.WGMMA
)  # how an accumulator [64, n] is spread over the 128 threads of a warpgroup
ROW = MATRIX.reduce(1)  # one number for each of its rows
COLUMN = MATRIX.reduce(0)  # one for each of its columns
F32 = jnp.float32
ACC = plgpu.WGMMAAccumulatorRef
# Their stubs call them abstract.
TILING: Any = plgpu.TilingTransform
SWIZZLE: Any = plgpu.SwizzleTransform

# The explicit layouts above are those of lane semantics; the solver that replaces them takes minutes for these kernels.
COMPILER = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)

_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters  # jax 0.11


def load(ref: Any, layout: Any, optimized: bool = True) -> jax.Array:
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def transposed(ref: Any) -> Any:
    """The same memory, read with rows for columns."""
    if _LOAD_TAKES_INDEX:
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


def swizzled(columns: int, shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory for matrices that go together with operands of `columns` columns: both need the same swizzle."""
    width = columns * jnp.dtype(dtype).itemsize
    layout = (TILING((8, columns)), SWIZZLE(width))
    return plgpu.SMEM(tuple(shape), dtype, transforms=layout)


def products(*operands: tuple[Any, Any]) -> list[jax.Array]:
    """x y of every pair (x, y) of references, float32. All are under way before the first is waited for."""

    def body(*accumulators):
        for accumulator, (x, y) in zip(accumulators, operands):
            plgpu.wgmma(accumulator, x, y)
        return [read(accumulator) for accumulator in accumulators]

    shapes = [(x.shape[0], y.shape[1]) for x, y in operands]
    return pl.run_scoped(body, *(ACC(shape) for shape in shapes))


def read(accumulator: Any) -> jax.Array:
    return lax.optimization_barrier(accumulator[...])


def rows(x: jax.Array, columns: int) -> jax.Array:
    """x[i] in every column of row i."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def columns(x: jax.Array, n: int = CHUNK) -> jax.Array:
    """x[j] in every row of column j."""
    return lax.broadcast_in_dim(x, (n, x.shape[0]), (1,))


def zeros(n: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((CHUNK, n), F32), MATRIX)


def tokens(ref: Any, only: jax.Array | None) -> jax.Array:
    """q or k of a chunk in float32, zero in the rows where the mask `only` is."""
    x = load(ref, MATRIX).astype(F32)
    return x if only is None else x * rows(only, x.shape[1])


def mask_of(info: Any, which: int) -> jax.Array:
    """One of the masks of `gpu_layout.segments`, a float for each row."""
    return load(info.at[which], ROW).astype(F32)


def roll(x_ref: Any, rolls_ref: Any, plan: Plan, groups: range) -> list[jax.Array]:
    """Those of the groups that are rolls, [64, F] each: a product with zeros and ones, so that they are exact."""
    F, n = plan.width, len([group for group in groups if group < plan.rolls])
    if not n:
        return []
    [side] = products((x_ref, rolls_ref.at[:, pl.ds(groups[0] * F, n * F)]))
    return [side[:, i * F : (i + 1) * F] for i in range(n)]


def features(
    x: jax.Array,
    rolled: list[jax.Array],
    only: jax.Array | None,
    plan: Plan,
    groups: range,
    weighted: bool,
) -> list[jax.Array]:
    """The groups, [64, F] each. x is zero, and so are they, where the mask `only` is."""
    values = [part * x for part in rolled]
    for group in groups[len(rolled) :]:
        if group == plan.rolls:
            values.append(x)
        elif group == plan.rolls + 1:
            values.append(constant(only, plan.width))
        else:
            values.append(zeros(plan.width))
    weights = [plan.weights[group] if weighted else 1.0 for group in groups]
    return [v if w in (0.0, 1.0) else v * w for v, w in zip(values, weights)]


def constant(only: jax.Array | None, n: int) -> jax.Array:
    """[64, n], ones (or the mask) in column 0."""
    first = plgpu.broadcasted_iota(jnp.int32, (CHUNK, n), 1, layout=MATRIX) == 0
    one = (
        rows(only, n) if only is not None else plgpu.layout_cast(jnp.ones((CHUNK, n), F32), MATRIX)
    )
    return jnp.where(first, one, zeros(n))


def side_by_side(parts: Sequence[jax.Array], dtype: Any) -> jax.Array:
    parts = [part.astype(dtype) for part in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def visible(positions: Any, info: Any | None, keys_in_rows: Any = None) -> jax.Array:
    """[64, 64]: whether the query of a row sees the key of a column.

    keys_in_rows: a slice `pl.ds` of n queries, for [64, n], whether the key of a row is seen by the query of a column.
    The positions 0 .. 63 come from memory: an iota would be computed before the loop and kept in registers through it.
    """
    some = pl.ds(0, CHUNK) if keys_in_rows is None else keys_in_rows
    n = some.size

    def pair(ref):
        return rows(load(ref, ROW), n), columns(load(ref.at[some], COLUMN))

    row, column = pair(positions)
    seen = row >= column if keys_in_rows is None else row <= column
    if info is None:
        return seen
    # Padding sees padding, whose keys and values are zeros; its own output means nothing.
    row, column = pair(info.at[IDS])
    return seen & (row == column)


def read_state(values: Any, denominator: Any, plan: Plan) -> tuple[jax.Array, ...]:
    """A state [rows, tile], [rows] from device memory: its slabs [64, tile], then the denominator's [64]."""
    slabs = [pl.ds(s * SLAB, SLAB) for s in range(plan.slabs)]
    block = [load(values.at[some], MATRIX, False) for some in slabs]
    return (*block, *(load(denominator.at[some], ROW, False) for some in slabs))


def empty_state(plan: Plan) -> tuple[jax.Array, ...]:
    block = [zeros(plan.tile) for _ in range(plan.slabs)]
    below = [plgpu.layout_cast(jnp.zeros(SLAB, F32), ROW) for _ in range(plan.slabs)]
    return (*block, *below)


def denominators(m: Any, half: Any, plan: Plan, group: int) -> jax.Array:
    """The denominator's part of the published state for one group of features, in every row of [64, F]."""
    here = pl.ds(group * plan.width, plan.width)
    return columns(load(m.denominators.at[half, here], COLUMN))
