"""One pallas_call of the TPU kernels: named operands, and the blocks that a plan gives to each kind of operand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.based.tpu_layout import CHUNK, MEMORY_LIMIT, Plan, marks_of, round_up


class Call:
    """Collects operands by name, then runs `kernel(given, out, scratch)` with dictionaries of references.

    The grid is (batch row, block of heads, block of tokens), the last walked in order, from its end if `reverse`.
    """

    def __init__(self, name: str, plan: Plan, reverse: bool = False):
        self.name, self.plan = name, plan
        self._given: dict[str, tuple[jax.Array, pl.BlockSpec]] = {}
        self._out: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {}
        self._scratch: dict[str, Any] = {}
        self._flops = 0
        last = plan.steps - 1
        self._step = (lambda s: last - s) if reverse else (lambda s: s)

    def tokens(self, name: str, x: jax.Array, heads: int) -> None:
        """x [b, n, width, T], of which a step sees `heads` heads."""
        self._given[name] = (x, self._tokens_spec(heads, x.shape[2]))

    def tokens_out(self, name: str, dtype: Any, heads: int, width: int) -> None:
        plan = self.plan
        shape = (plan.b, plan.grid[1] * heads, width, max(plan.t, CHUNK))
        self._out[name] = (jax.ShapeDtypeStruct(shape, dtype), self._tokens_spec(heads, width))

    def state(self, name: str, x: jax.Array) -> None:
        """x [b, g, ., .], the same block for every step of the sequence."""
        self._given[name] = (x, self._state_spec(x.shape[2:]))

    def state_out(self, name: str, tile: tuple[int, int]) -> None:
        shape = (self.plan.b, self.plan.g, *tile)
        self._out[name] = (jax.ShapeDtypeStruct(shape, jnp.float32), self._state_spec(tile))

    def segments(self, ids: jax.Array | None) -> None:
        """Ids to VMEM and marks to SMEM, where the plan needs any (an unused operand is never passed)."""
        if not self.plan.masked:
            return
        ids, marks = marks_of(ids, self.plan)
        where = lambda i, n, s: (i, 0, self._step(s))
        self._given["ids"] = (ids, pl.BlockSpec((1, 1, self.plan.block), where))
        whole = pl.BlockSpec(
            (1, *marks.shape[1:]), lambda i, n, s: (i, 0, 0), memory_space=pltpu.SMEM
        )
        self._given["marks"] = (marks, whole)

    def scratch(self, **shapes: tuple[tuple[int, ...], Any]) -> None:
        self._scratch |= {name: pltpu.VMEM(*shape) for name, shape in shapes.items()}

    def flops(self, n: int) -> None:
        self._flops = n

    def run(self, kernel: Callable[..., None]) -> dict[str, jax.Array]:
        given = {name: x for name, (x, _) in self._given.items()}
        arrays = [*given.values(), *(shape for shape, _ in self._out.values())]
        moved = sum(x.size * x.dtype.itemsize for x in arrays)
        need = self._vmem_bytes()
        results = pl.pallas_call(
            lambda given, *rest: kernel(given, *self._named(rest)),
            out_shape=[shape for shape, _ in self._out.values()],
            grid=self.plan.grid,
            in_specs=[{name: spec for name, (_, spec) in self._given.items()}],
            out_specs=[spec for _, spec in self._out.values()],
            scratch_shapes=list(self._scratch.values()),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=min(max(16 * 2**20, need + need // 2), MEMORY_LIMIT * 3 // 2),
            ),
            cost_estimate=pl.CostEstimate(
                flops=self._flops, transcendentals=0, bytes_accessed=moved
            ),
            name=self.name,
        )(given)
        return dict(zip(self._out, results))

    def _named(self, refs) -> tuple[dict[str, Any], dict[str, Any]]:
        n = len(self._out)
        return dict(zip(self._out, refs[:n])), dict(zip(self._scratch, refs[n:]))

    def _vmem_bytes(self) -> int:
        """Blocks are there twice, scratch once; tiles of 8 sublanes and 128 lanes are whole."""
        blocks = [
            (spec.block_shape, x.dtype)
            for x, spec in self._given.values()
            if spec.memory_space is None
        ]
        blocks += [(spec.block_shape, x.dtype) for x, spec in self._out.values()]
        scratch = [(x.shape, x.dtype) for x in self._scratch.values()]
        return sum(2 * _bytes(*x) for x in blocks) + sum(_bytes(*x) for x in scratch)

    def _tokens_spec(self, heads: int, width: int) -> pl.BlockSpec:
        shape = (1, heads, width, self.plan.block)
        return pl.BlockSpec(shape, lambda i, n, s: (i, n, 0, self._step(s)))

    def _state_spec(self, tile: tuple[int, int]) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.plan.groups, *tile), lambda i, n, s: (i, n, 0, 0))


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    *leading, rows, lanes = shape
    size = round_up(rows, 8) * round_up(lanes, 128) * jnp.dtype(dtype).itemsize
    for n in leading:
        size *= n
    return size
