"""What a training step carries from one step to the next, and its first value."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from jaxtyping import PRNGKeyArray

from train.tasks import Task

Sums = Mapping[str, tuple[Array, Array]]


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on, and all of it is checkpointed: two runs with equal states have equal futures.

    params, opt_state: trees of arrays.
    step: int32[], steps taken, skipped ones included; data and dropout are functions of it.
    sums: metric -> (sum, count), float32[] each, since the last line of the log.
    skipped: int32[], steps whose gradient was not finite.
    bad_streak: int32[], how many of those came last in a row.
    """

    params: Any
    opt_state: Any
    step: Any
    sums: Any
    skipped: Any
    bad_streak: Any


def init_state(
    model: nn.Module,
    task: Task,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    metric_names: tuple[str, ...],
) -> TrainState:
    """The state before the first step; traceable, so that jit can create it sharded (or only its shapes)."""
    tokens = jnp.zeros(task.sample_tokens, jnp.int32)
    params = model.init(key, tokens)["params"]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        step=zero,
        sums={name: (jnp.zeros(()), jnp.zeros(())) for name in metric_names},
        skipped=zero,
        bad_streak=zero,
    )


def count_parameters(params: Any) -> int:
    """Numbers in the tree, shared ones once."""
    return sum(x.size for x in jax.tree.leaves(params))
