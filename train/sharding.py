"""The device mesh, and where each array of a run lives on it.

Parameters are plain arrays (no boxes): one table maps the end of a parameter's path to mesh axes, and the optimiser's
moments follow because their paths end the same way. XLA inserts the collectives (axis type Auto).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from train.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

# (end of the path, axes of the last dimensions). The first match wins; what matches nothing is replicated.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding", ("tensor", "fsdp")),  # [vocabulary, d]: tied head, logits split by vocabulary
    (r"lm_head/kernel", ("fsdp", "tensor")),  # [d, vocabulary]: logits split by vocabulary
    (
        r"(out_proj|fc2)/kernel",
        ("tensor", "fsdp"),
    ),  # [wide, d]: sums over tensor, back to the stream
    (r"kernel", ("fsdp", "tensor")),  # [d, wide]: every other projection, split by its outputs
)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of config.mesh over `devices` (default: all); an axis of -1 takes the devices that the others leave.

    Raises:
      UserError: sizes that do not multiply to the number of devices, more than one -1, a batch or a micro-batch that
        does not divide by data * fsdp.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [int(config.mesh[axis]) for axis in AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh ({given}): sizes are 1 or more, and at most one may be -1")
    if -1 in sizes:
        others = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // others
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh ({given}) does not fit {len(devices)} {devices[0].platform} device(s); "
            "the sizes must multiply to that number"
        )
    check_batch(config, sizes[0] * sizes[1])
    return jax.make_mesh(
        tuple(sizes), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES)
    )


def check_batch(config: ConfigDict, shards: int) -> None:
    """UserError unless every device gets the same number of rows of every micro-batch."""
    parts = int(config.optimizer.accumulate)
    if parts < 1:
        raise UserError(f"config.optimizer.accumulate must be 1 or more, got {parts}")
    if config.batch_size < 1 or config.batch_size % (parts * shards):
        times = f" times config.optimizer.accumulate={parts}" if parts > 1 else ""
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide by mesh data*fsdp={shards}{times}; "
            f"use a multiple of {parts * shards}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension over data x fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_over(params: Any, batch_size: int) -> NamedSharding | None:
    """How the rows of an evaluation are spread: over the batch axes of the mesh that holds the parameters, None where that cannot be."""
    sharding = getattr(next(iter(jax.tree.leaves(params)), None), "sharding", None)
    if not isinstance(sharding, NamedSharding) or not set(BATCH_AXES) <= set(
        sharding.mesh.axis_names
    ):
        return None
    mesh = sharding.mesh
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return batch_sharding(mesh) if shards > 1 and batch_size % shards == 0 else None


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a train state, or of any tree of arrays or shapes that ends in parameter paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh)),
        tree,
    )


def partition_spec(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """RULES applied to one array. A dimension that its axis does not divide evenly is replicated."""
    for pattern, axes in RULES:
        if re.search(rf"(^|/)({pattern})$", name) and len(shape) >= len(axes):
            leading = (None,) * (len(shape) - len(axes))
            return PartitionSpec(
                *leading,
                *(
                    axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, shape[len(leading) :])
                ),
            )
    return PartitionSpec()


def path_name(path: tuple[Any, ...]) -> str:
    """`params/layers_0/mixer/Wqkv/kernel`, the same for dicts, lists, tuples and named tuples."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
