"""vmap for kernels: a mapped axis becomes part of axis 0 of every array, which counts rows that are computed independently."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array


def by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """function, for whose vmap no kernel needs a rule of its own. Inside of a custom_vjp: it has no derivative."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size, batched, *args):
        flat, tree = jax.tree.flatten(args)
        axes = [0 if yes else None for yes in jax.tree.leaves(batched)]
        out = by_rows(function)(*jax.tree.unflatten(tree, merge_rows(size, flat, axes)))
        out = jax.tree.map(lambda x: split_rows(size, x), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def merge_rows(size: int, arrays: Sequence[Array], axes: Sequence[int | None]) -> list[Array]:
    """The mapped axis of length `size`, which an array may lack, before its axis 0, as one axis."""

    def one(x, axis):
        x = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        return x.reshape(size * x.shape[1], *x.shape[2:])

    return [one(x, axis) for x, axis in zip(arrays, axes)]


def split_rows(size: int, x: Array) -> Array:
    return x.reshape(size, -1, *x.shape[1:])
