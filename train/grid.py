"""Several learning rates and seeds of one config as one compiled program.

The train states of p points are stacked on a leading axis, and one call moves all of them on by up to `count` steps of the
same batches:

    state, report = grid.call(points, state, inputs, counts, fresh, program=program)

Point i has its own learning rate and dropout key (`points`, leading axis p), its own number of steps to take (`counts[i]`; 0
for one that has ended, which then costs nothing or, on an accelerator, changes nothing), and stops by itself after too many
gradients that were not finite. The body of a step is that of a single run (train/step.py).

On a CPU the points follow one another in a `lax.map` around the loop over steps, because a batched step is slower there than
p steps (measured: 1.2 to 1.8 times). On an accelerator the loop over steps is outside, a batch is made once, and the step is
batched over the points. Over several devices the points are spread over the mesh axes (data, fsdp), and every device trains
its own share with whole batches: nothing is sent.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from train import sharding
from train.errors import UserError
from train.optimizer import make_schedule
from train.sharding import BATCH_AXES
from train.state import TrainState
from train.step import (
    Hyperparameters,
    Report,
    dropout_key,
    make_advance,
    make_report,
    make_step,
    make_training,
    metric_names,
    read_report,
    with_fresh_sums,
)
from train.tasks import Task


@flax.struct.dataclass
class GridState(TrainState):
    """What a checkpoint of a grid holds: every leaf has a leading axis of points.

    best: the train states at the best evaluation of each point so far.
    """

    best: Any


class Grid(NamedTuple):
    """The compiled parts of a grid. `size` counts the points on the device, those that only pad included."""

    init: Callable[[], TrainState]
    call: Callable[..., tuple[TrainState, Float[Array, "p report"]]]
    read: Callable[[Any], list[Report]]  # one Report per point that does not pad
    take: Callable[
        [TrainState, int], TrainState
    ]  # the state of a point, laid out as a single run's
    keep: Callable[[TrainState, TrainState, Bool[np.ndarray, " n"]], TrainState]
    points: Hyperparameters
    abstract: GridState
    size: int


def make_grid(
    configs: Sequence[ConfigDict], model: nn.Module, task: Task, mesh: Mesh, form: str | None = None
) -> Grid:
    """The grid of configs that differ in learning_rate and seed only.

    form: "map" or "vmap" (see the module's docstring); None picks by the platform of the mesh.

    Raises:
      UserError: see train.optimizer and check_mesh.
    """
    check_mesh(mesh)
    for config in configs:
        make_schedule(config)
    config = configs[0]
    # one axis of devices: no rule splits the parameters of a point
    devices = mesh.devices.reshape(-1, *[1] * (len(mesh.axis_names) - 1))
    mesh = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
    single = make_training(config, model, task, mesh)
    size = -(-len(configs) // mesh.size) * mesh.size
    padded = [*configs, *[config] * (size - len(configs))]
    over_points = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=over_points),
        single.abstract,
    )
    layout = jax.tree.map(lambda x: x.sharding, stacked)
    single_layout = jax.tree.map(lambda x: x.sharding, single.abstract)
    form = form or ("map" if mesh.devices.flat[0].platform == "cpu" else "vmap")
    one_step = make_step(config, model, task, None)
    advance = {"map": _map_over_points, "vmap": _batched_over_points}[form](
        one_step, task, config.max_bad_steps
    )
    stack = jax.jit(
        lambda *states: jax.tree.map(lambda *x: jnp.stack(x), *states), out_shardings=layout
    )
    take = jax.jit(
        lambda state, i: jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), state
        ),
        out_shardings=single_layout,
    )
    names = metric_names(model, task)

    def read(report: Float[Array, "p report"]) -> list[Report]:
        return [read_report(names, row) for row in np.asarray(report)[: len(configs)]]

    def keep(best: TrainState, state: TrainState, better: Bool[np.ndarray, " n"]) -> TrainState:
        mask = np.zeros(size, bool)
        mask[: len(better)] = better
        return _choose(best, state, mask)

    _choose = jax.jit(_where_points, donate_argnums=0, out_shardings=layout)
    return Grid(
        init=lambda: stack(*(single.init(jax.random.key(c.seed)) for c in padded)),
        call=_make_call(advance, mesh, layout),
        read=read,
        take=lambda state, i: take(state, np.int32(i)),
        keep=keep,
        points=_hyperparameters(padded, over_points),
        abstract=GridState(**_fields(stacked), best=stacked),
        size=size,
    )


def check_mesh(mesh: Mesh | AbstractMesh) -> None:
    """UserError unless every model of a grid can live on one device."""
    if math.prod(mesh.shape[axis] for axis in mesh.shape if axis not in BATCH_AXES) > 1:
        raise UserError(
            "a grid of learning rates and seeds spreads its points over config.mesh.data and fsdp; config.mesh.tensor and "
            "sequence must be 1"
        )


def with_best(state: TrainState, best: TrainState) -> GridState:
    """Both as one tree, for a checkpoint."""
    return GridState(**_fields(state), best=best)


def without_best(state: GridState) -> tuple[TrainState, TrainState]:
    """(state, best) again."""
    fields = _fields(state)
    return TrainState(**{name: fields[name] for name in _NAMES}), state.best


_NAMES = tuple(field.name for field in dataclasses.fields(TrainState))


def _fields(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _NAMES}


def _hyperparameters(configs: Sequence[ConfigDict], over_points: NamedSharding) -> Hyperparameters:
    """Leading axis p. Keys as their data, uint32[p, 2], which any device can hold."""
    keys = [dropout_key(config) for config in configs]
    rates = np.array([config.learning_rate for config in configs], np.float32)
    data = None if keys[0] is None else np.stack([np.asarray(jax.random.key_data(k)) for k in keys])
    return jax.device_put(Hyperparameters(rates, data), over_points)


def _with_key(point: Hyperparameters) -> Hyperparameters:
    key = point.dropout_key
    return point if key is None else point._replace(dropout_key=jax.random.wrap_key_data(key))


def _make_call(advance: Callable[..., Any], mesh: Mesh, layout: Any) -> Callable[..., Any]:
    """The jitted function of the module's docstring. The state is donated: use the one that comes back."""
    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()

    @partial(
        jax.jit,
        static_argnames="program",
        donate_argnames="state",
        out_shardings=(layout, sharding.replicated(mesh)),
    )
    def train_call(
        points: Hyperparameters,
        state: TrainState,
        inputs: Any,
        counts: Int[Array, " p"],
        fresh: Bool[Array, ""],
        *,
        program: Hashable,
    ) -> tuple[TrainState, Float[Array, "p report"]]:
        body = partial(advance, program=program)
        if mesh.size > 1:
            body = jax.shard_map(
                body,
                mesh=mesh,
                in_specs=(split, split, whole, split, whole),
                out_specs=(split, split),
                check_vma=False,  # nothing is replicated, and kernels say nothing about it
            )
        return body(points, state, inputs, counts, fresh)

    return train_call


def _map_over_points(
    one_step: Callable[..., TrainState], task: Task, max_bad_steps: int
) -> Callable[..., Any]:
    """Point after point: the call of a single run inside `lax.map`."""
    single = make_advance(one_step, task, max_bad_steps)

    def advance(points, state, inputs, counts, fresh, *, program):
        def point_call(point_state_count):
            point, state, count = point_state_count
            return single(_with_key(point), state, inputs, count, fresh, program=program)

        return jax.lax.map(point_call, (points, state, counts))

    return advance


def _batched_over_points(
    one_step: Callable[..., TrainState], task: Task, max_bad_steps: int
) -> Callable[..., Any]:
    """Step after step: all points take it at once, on one batch."""

    def advance(points, state, inputs, counts, fresh, *, program):
        # the points that go on stand at one step, whose batch they share
        first = jnp.max(jnp.where(counts > 0, state.step, 0))

        def goes_on(offset, state):
            return (offset < counts) & (state.bad_streak <= max_bad_steps)

        def body(carry):
            offset, state = carry
            batch = task.batch(program, inputs, first + offset, offset)
            new = jax.vmap(lambda point, state: one_step(_with_key(point), state, batch))(
                points, state
            )
            return offset + 1, _where_points(state, new, goes_on(offset, state))

        start = (jnp.zeros((), jnp.int32), with_fresh_sums(state, fresh))
        _, state = jax.lax.while_loop(lambda carry: goes_on(*carry).any(), body, start)
        return state, jax.vmap(make_report)(state)

    return advance


def _where_points(old: Any, new: Any, mask: Bool[Any, " p"]) -> Any:
    """new[i] where mask[i], old[i] elsewhere."""

    def choose(o: Array, n: Array) -> Array:
        return jnp.where(jnp.reshape(mask, (-1,) + (1,) * (n.ndim - 1)), n, o)

    return jax.tree.map(choose, old, new)
