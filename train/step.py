"""The compiled training step: several steps in one program, nothing read back on the way.

    state, report = train_call(state, inputs, count, fresh, program=program)

runs `count` steps. The count is an argument of the program, so any number of steps up to a boundary (a log line, an
evaluation, a checkpoint) runs through the same executable and gives the same bits. `report` is one small vector that
stays on the device until somebody reads it.
"""

import dataclasses
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from train import sharding
from train.optimizer import Rate, make_optimizer, make_rate, make_schedule
from train.state import Sums, TrainState, init_state
from train.tasks import Task

TrainCall = Callable[..., tuple[TrainState, Float[Array, " report"]]]
OWN_METRICS = ("grad_norm", "learning_rate")


class Report(NamedTuple):
    """What the host learns of a call: `sums` since the last log line, skipped steps in all, and those last in a row."""

    sums: dict[str, tuple[float, float]]
    skipped: int
    bad_streak: int

    @property
    def means(self) -> dict[str, float]:
        """sum / count of every metric that counted anything (steps that were skipped count nothing)."""
        return {name: total / count for name, (total, count) in self.sums.items() if count}


class Hyperparameters(NamedTuple):
    """What the points of a grid (train/grid.py) differ in, and a compiled step may therefore take as traced values.

    learning_rate: the peak, a float or float32[].
    dropout_key: the key that every step folds its number into; None where the model drops nothing.
    """

    learning_rate: Any
    dropout_key: Array | None


class Training(NamedTuple):
    """The compiled parts of a run, and how its state is laid out."""

    init: Callable[..., TrainState]  # () or (key)
    call: TrainCall
    read: Callable[[Float[Array, " report"]], Report]
    abstract: TrainState  # shapes, dtypes and shardings of the state


def make_training(config: ConfigDict, model: nn.Module, task: Task, mesh: Mesh) -> Training:
    """Compiles nothing yet; the first call of `init` and of each program of `call` does.

    Raises:
      UserError: see train.optimizer.
    """
    make_schedule(config)  # refuses a rate that is not positive
    optimizer = make_optimizer(config)
    key = jax.random.key(config.seed)
    names = metric_names(model, task)
    init = partial(init_state, model, task, optimizer, metric_names=names)
    shapes = jax.eval_shape(init, key)
    layout = sharding.shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout
    )
    advance = make_advance(make_step(config, model, task, mesh), task, config.max_bad_steps)
    point = Hyperparameters(float(config.learning_rate), dropout_key(config))
    # LLVM's best takes a second on a program that runs once; level 1 gives the same bits in half of it.
    cheap = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    compiled_init = jax.jit(init, out_shardings=layout, compiler_options=cheap)
    return Training(
        init=lambda key=key: compiled_init(key),
        call=make_call(partial(advance, point), mesh, layout),
        read=partial(read_report, names),
        abstract=abstract,
    )


def make_call(advance: Callable[..., Any], mesh: Mesh, layout: Any) -> TrainCall:
    """The jitted function of the module's docstring. The state is donated: use the one that comes back."""

    @partial(
        jax.jit,
        static_argnames="program",
        donate_argnames="state",
        out_shardings=(layout, sharding.replicated(mesh)),
    )
    def train_call(
        state: TrainState, inputs: Any, count: Array, fresh: Array, *, program: Hashable
    ) -> tuple[TrainState, Float[Array, " report"]]:
        return advance(state, inputs, count, fresh, program=program)

    return train_call


def make_advance(
    one_step: Callable[..., TrainState], task: Task, max_bad_steps: int
) -> Callable[..., tuple[TrainState, Float[Array, " report"]]]:
    """The traced body of a call: (hyperparameters, state, inputs, count, fresh, program) -> (state, report).

    program: static, what `task.batch` needs to know to trace. inputs: arrays for these steps. count: int32[].
    fresh: bool[], start the metric sums again (the last call ended on a log line).
    Steps stop early, and for good, once more than max_bad_steps gradients in a row were not finite.
    """

    def advance(
        point: Hyperparameters,
        state: TrainState,
        inputs: Any,
        count: Array,
        fresh: Array,
        *,
        program: Hashable,
    ) -> tuple[TrainState, Float[Array, " report"]]:
        def unfinished(carry):
            offset, state = carry
            return (offset < count) & (state.bad_streak <= max_bad_steps)

        def body(carry):
            offset, state = carry
            batch = task.batch(program, inputs, state.step, offset)
            return offset + 1, one_step(point, state, batch)

        start = (jnp.zeros((), jnp.int32), with_fresh_sums(state, fresh))
        _, state = jax.lax.while_loop(unfinished, body, start)
        return state, make_report(state)

    return advance


def with_fresh_sums(state: TrainState, fresh: Array) -> TrainState:
    """The state with its metric sums at zero where `fresh`."""
    sums = jax.tree.map(lambda x: jnp.where(fresh, jnp.zeros_like(x), x), state.sums)
    return dataclasses.replace(state, sums=sums)


def make_report(state: TrainState) -> Float[Array, " report"]:
    """What `read_report` reads."""
    report = [state.skipped, state.bad_streak, *jax.tree.leaves(state.sums)]
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in report])


def make_step(
    config: ConfigDict, model: nn.Module, task: Task, mesh: Mesh | None
) -> Callable[[Hyperparameters, TrainState, Any], TrainState]:
    """`train_step` of a config as a function of what is traced. mesh None: the step belongs to one device.

    Raises:
      UserError: see train.optimizer.
    """
    return partial(
        train_step,
        gradients=make_gradients(config, model, task, mesh),
        optimizer=make_optimizer(config),
        rate_at=make_rate(config),
        clip_norm=float(config.optimizer.clip_norm),
    )


def train_step(
    point: Hyperparameters,
    state: TrainState,
    batch: Any,
    *,
    gradients: Callable[..., tuple[Any, Sums]],
    optimizer: optax.GradientTransformation,
    rate_at: Rate,
    clip_norm: float,
) -> TrainState:
    """One update, or, where the gradient's norm is not finite, none: parameters, moments and sums stay, the step counts.

    The norm is computed once: it is logged, it clips (g <- g min(1, clip_norm / |g|)), and it tells whether every
    gradient is finite. (A float32 norm overflows at 1.8e19; such a gradient is of no use either.)
    """
    key = point.dropout_key
    rng = None if key is None else jax.random.fold_in(key, state.step)
    grads, metrics = gradients(state.params, batch, rng)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    rate = rate_at(point.learning_rate, state.step)
    if clip_norm:
        scale = jnp.where(norm > clip_norm, clip_norm / norm, 1.0)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: (p + rate * u).astype(p.dtype), state.params, updates)
    one = jnp.ones(())
    metrics = {**metrics, "grad_norm": (norm, one), "learning_rate": (rate, one)}
    sums = {
        name: tuple(
            old + new.astype(jnp.float32) for old, new in zip(state.sums[name], metrics[name])
        )
        for name in state.sums
    }

    def unless_bad(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    return TrainState(
        params=unless_bad(params, state.params),
        opt_state=unless_bad(opt_state, state.opt_state),
        step=state.step + 1,
        sums=unless_bad(sums, dict(state.sums)),
        skipped=state.skipped + ~finite,
        bad_streak=jnp.where(finite, 0, state.bad_streak + 1),
    )


def make_gradients(
    config: ConfigDict, model: nn.Module, task: Task, mesh: Mesh | None
) -> Callable[..., tuple[Any, Sums]]:
    """(params, batch, rng) -> (gradient of the mean loss, metric sums), in config.optimizer.accumulate parts.

    The parts are weighted by the count of the metric "loss", so that the result is the gradient of the whole batch's mean
    also when the parts hold different numbers of labels.
    """
    parts = int(config.optimizer.accumulate)
    over_batch = None if mesh is None else sharding.batch_sharding(mesh)

    def constrain(batch: Any) -> Any:
        return batch if over_batch is None else jax.lax.with_sharding_constraint(batch, over_batch)

    def gradient(params: Any, batch: Any, rng: Array | None) -> tuple[Any, Sums]:
        loss = lambda p: task.loss(model, p, constrain(batch), rng)
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, metrics

    def accumulated(params: Any, batch: Any, rng: Array | None) -> tuple[Any, Sums]:
        # Row i goes to part i mod n: every device splits its own rows, and none travel.
        split = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1),
            constrain(batch),
        )

        def weighted(index: Array, part: Any) -> tuple[Any, Sums]:
            part_rng = None if rng is None else jax.random.fold_in(rng, index)
            grads, metrics = gradient(params, part, part_rng)
            count = metrics["loss"][1]
            return jax.tree.map(lambda g: g * count.astype(g.dtype), grads), metrics

        def add(total: Any, indexed_part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, weighted(*indexed_part)), None

        indexed = (jnp.arange(parts), split)
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(lambda i: weighted(*jax.tree.map(lambda x: x[0], i)), indexed),
        )
        (grads, metrics), _ = jax.lax.scan(add, zero, indexed)
        count = jnp.maximum(metrics["loss"][1], 1)
        return jax.tree.map(lambda g: g / count.astype(g.dtype), grads), metrics

    return gradient if parts == 1 else accumulated


def dropout_key(config: ConfigDict) -> Array | None:
    """The key that every step folds its number into; None where the model drops nothing, so that no mask is drawn."""
    return jax.random.key(config.seed) if _has_dropout(config.model) else None


def _has_dropout(node: Any) -> bool:
    if isinstance(node, (ConfigDict, dict)):
        return any(
            ("drop" in key and isinstance(node[key], (int, float)) and node[key] > 0)
            or _has_dropout(node[key])
            for key in node
        )
    return isinstance(node, (list, tuple)) and any(_has_dropout(item) for item in node)


def metric_names(model: nn.Module, task: Task) -> tuple[str, ...]:
    """Names of the metrics that the task's loss returns, found without computing anything, and OWN_METRICS."""
    program, _ = task.program_at(0)
    inputs = task.inputs(0, 1)

    def trace(inputs: Any) -> Any:
        params = model.init(jax.random.key(0), jnp.zeros(task.sample_tokens, jnp.int32))["params"]
        step = jnp.zeros((), jnp.int32)
        return task.loss(model, params, task.batch(program, inputs, step, step), None)[1]

    return (*sorted(jax.eval_shape(trace, inputs)), *OWN_METRICS)


def read_report(
    names: tuple[str, ...], report: Float[Array, " report"] | Float[np.ndarray, " report"]
) -> Report:
    """Waits for the call that `report` comes from."""
    skipped, streak, *rest = (float(x) for x in np.asarray(report))
    pairs = zip(rest[::2], rest[1::2])
    return Report(dict(zip(sorted(names), pairs)), int(skipped), int(streak))
