"""A function that is traced only when a program is lowered for the platform that wants it.

`jax.lax.platform_dependent` traces every branch, so that a call on a CPU would import Pallas and trace the kernels for TPU and
GPU first. A branch wrapped in `deferred` costs one equation until a program for its platform is lowered, on whichever machine.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import PyTree

from pallas_kernels.by_rows import merge_rows, split_rows

# A function of arrays whose axis 0 counts rows that it treats independently (so that vmap adds rows), compared by value.
Rows = Callable[..., Any]


def deferred(function: Rows, like: Rows, *args: PyTree) -> PyTree:
    """function(*args), which has the shapes and dtypes of like(*args).

    Where a program is to be spread over devices automatically (jit over a mesh, outside of shard_map) `like` runs instead:
    the compiler can divide it, and cannot divide a kernel. There is no derivative: call it inside of a custom_vjp.
    """
    flat, tree = jax.tree.flatten(args)
    out_tree = jax.tree.structure(jax.eval_shape(like, *args))
    return jax.tree.unflatten(
        out_tree, _deferred.bind(*flat, function=function, like=like, tree=tree)
    )


_deferred = Primitive("deferred")
_deferred.multiple_results = True


def _flat(function: Callable[..., Any], tree: Any) -> Callable[..., list[Any]]:
    return lambda *flat: jax.tree.leaves(function(*jax.tree.unflatten(tree, flat)))


@_deferred.def_abstract_eval
def _abstract(*avals, function, like, tree):
    return jax.make_jaxpr(_flat(like, tree))(*avals).out_avals


@functools.lru_cache(maxsize=256)
def _compiled(function, like, tree):
    return jax.jit(functools.partial(_deferred.bind, function=function, like=like, tree=tree))


@_deferred.def_impl
def _run(*args, **fixed):
    return _compiled(**fixed)(*args)


def _lower(ctx, *args, function, like, tree):
    chosen = like if _divides(ctx.module_context.axis_context) else function
    return mlir.lower_fun(_flat(chosen, tree), multiple_results=True)(ctx, *args)


def _divides(context: Any) -> bool:
    """Whether the compiler is to spread the program over devices: the condition under which Mosaic refuses to lower."""
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices != 1
    if isinstance(context, mlir.SPMDAxisContext):
        manual = context.manual_axes | set(context.mesh.manual_axes)
        return bool(context.manual_axes) and manual != frozenset(context.mesh.axis_names)
    return False


mlir.register_lowering(_deferred, _lower)


def _batch(args, axes, *, function, like, tree):
    size = next(x.shape[axis] for x, axis in zip(args, axes) if axis is not None)
    rows = merge_rows(size, args, axes)
    out = _deferred.bind(*rows, function=function, like=like, tree=tree)
    return [split_rows(size, x) for x in out], [0] * len(out)


batching.primitive_batchers[_deferred] = _batch
