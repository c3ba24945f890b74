"""What the training loop knows about an experiment: where its batches come from, its loss and its metrics."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flax import linen as nn
from jax import Array
from jaxtyping import PRNGKeyArray

from jaxmodels.typing import Params

Program: TypeAlias = (
    Any  # hashable: what differs between compiled steps, e.g. the shape of the batch
)
Batch: TypeAlias = Any  # a pytree of arrays, leading dimension batch_size
Metrics: TypeAlias = dict[str, tuple[Array, Array]]  # name -> (sum, count); reported: sum / count
FOREVER = 2**31 - 1  # steps of a program that never ends


@dataclasses.dataclass(frozen=True)
class Task:
    """One experiment as functions of the step. The loop calls nothing else, and knows no task by name.

    name: for messages.
    batch_size: rows of a batch, over all devices.
    sample_tokens: (batch, length) of an example input, for model.init.
    tokens_per_step: program -> tokens that one step of it reads.
    program_at: step -> (program of that step, how many steps it lasts from this one on). A program is hashable and
      static under jit; calls of the loop never cross its end.
    inputs: (first step, count) -> arrays for these steps, handed to the jitted call; the same shapes for every count up to
      config.steps_per_call. A task that makes its data on the device returns {}.
    batch: traced: (program, inputs, step, offset of the step within the call) -> batch.
    loss: traced: (model, params, batch, dropout key or None) -> (mean loss, metrics). "loss" is one of the metrics and its
      count is the weight of the batch among others.
    evaluate: (model, params) -> metrics over the whole test data. Deterministic; keeps its compiled functions.
    best: (a metric of evaluate, "max" or "min"), by which the best checkpoint is chosen.
    state_length: the number of tokens at which the state's bytes are reported, the longest sequence of the test.
    iterator: where `inputs` come from when they are not a function of the step: an iterator of grain, whose
      get_state() (JSON) goes into every checkpoint and whose set_state() finds the place again; None where they are.
    files: name -> content of what a run directory must hold for the model to be used, e.g. its tokenizer.
    sample: (model, params) -> a text that shows what was learned, for the end of a run; None where there is none.
    """

    name: str
    batch_size: int
    sample_tokens: tuple[int, int]
    tokens_per_step: Callable[[Program], int]
    program_at: Callable[[int], tuple[Program, int]]
    inputs: Callable[[int, int], Any]
    batch: Callable[[Program, Any, Array, Array], Batch]
    loss: Callable[[nn.Module, Params, Batch, PRNGKeyArray | None], tuple[Array, Metrics]]
    evaluate: Callable[[nn.Module, Params], dict[str, float]]
    best: tuple[str, str]
    state_length: int
    iterator: Any = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    sample: Callable[[nn.Module, Params], str] | None = None
