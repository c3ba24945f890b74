"""MQAR as a training task: which example stands in which step, the loss on its labels, the test segments.

Order, as in the papers: an epoch visits the training segments as listed, ceil(num_examples / batch) steps each, and no
batch mixes two. Row j of the k-th batch ever taken from a segment is its example (k batch + j) mod num_examples, so a last
batch that the original would cut short wraps round instead.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Int, PRNGKeyArray
from ml_collections import ConfigDict

from jaxmodels.typing import Params
from train.config import from_plain
from train.config_paths import to_plain
from train.cross_entropy import cross_entropy
from train.data import mqar, mqar_zoology
from train.data.mqar import Segment
from train.errors import UserError
from train.tasks.forward import hidden_states
from train.tasks.mqar_evaluation import make_evaluate
from train.tasks.task import FOREVER, Batch, Metrics, Task

# what a segment of a config may say, and what kind of value that is
_SEGMENT_KEYS: dict[str, tuple[type, ...]] = {
    "length": (int,),
    "num_kv_pairs": (int,),
    "num_examples": (int, type(None)),
    "power_a": (int, float),
    "random_non_queries": (bool,),
    "num_passes": (int,),
}


@dataclasses.dataclass(frozen=True)
class Order:
    """Which examples a step takes: the arithmetic of the module's docstring."""

    segments: tuple[Segment, ...]
    batch_size: int

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of each segment in one epoch; 1 for an endless one."""
        return tuple(-(-(s.num_examples or 1) // self.batch_size) for s in self.segments)

    def program_at(self, step: int) -> tuple[int, int]:
        """(index of the segment of this step, steps left in this visit of it)."""
        if len(self.segments) == 1:
            return 0, FOREVER
        local = step % sum(self.steps)
        for index, steps in enumerate(self.steps):
            if local < steps:
                return index, steps - local
            local -= steps
        raise AssertionError("a step lies in some segment")

    def visit(self, index: int, step: Any) -> Any:
        """How many batches of the segment lie before this step (an int, or a traced integer)."""
        epoch = sum(self.steps)
        return step // epoch * self.steps[index] + step % epoch - sum(self.steps[:index])

    def period(self, index: int) -> int | None:
        """Batches after which a segment repeats; None for an endless one."""
        n = self.segments[index].num_examples
        return None if n is None else math.lcm(n, self.batch_size) // self.batch_size

    def indices(self, index: int, step: Int[Array, ""]) -> Array:
        """Traced: uint32[batch], the examples of a step. An endless segment starts again after 2^32 examples."""
        visit, row = self.visit(index, step), jnp.arange(self.batch_size, dtype=jnp.uint32)
        period, n = self.period(index), self.segments[index].num_examples
        if period is None or n is None:
            return visit.astype(jnp.uint32) * jnp.uint32(self.batch_size) + row
        # modulo the period first, so that the product stays below lcm(n, batch) <= 2^32
        first = (visit % period).astype(jnp.uint32) * jnp.uint32(self.batch_size)
        return (first + row) % jnp.uint32(n)

    def host_indices(self, index: int, first: int, count: int) -> Int[np.ndarray, "count b"]:
        """`indices` of the steps first ... first + count - 1, on the host."""
        n = self.segments[index].num_examples
        visits = self.visit(index, first) + np.arange(count, dtype=np.int64)
        rows = visits[:, None] * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        return rows if n is None else rows % n


def build(config: ConfigDict) -> Task:
    """The task of a run config. Reads config.data, config.model.vocab_size, batch_size, steps_per_call and seed.

    config.data.mode "device" generates inside the training step; "zoology" draws the original's numbers on the host first
    (train/data/mqar_zoology.py), keeps them under config.data.cache_dir, and seeds its segments from 123 as the original
    does, unless config.data.seed says otherwise; "device" uses config.seed.

    Raises:
      UserError: one line, for anything that `Segment` refuses, an unknown key of a segment, an endless segment beside
        others or in the test, or no segment at all.
    """
    train, test = segments_of(config)
    order = Order(train, int(config.batch_size))
    _check_periods(order)
    zoology = config.data.mode == "zoology"
    cache_dir = config.data.get("cache_dir", None)
    draws = tuple(mqar_zoology.load(s, cache_dir) for s in train) if zoology else None
    lengths = [segment.length for segment in train]
    return Task(
        name="mqar",
        batch_size=order.batch_size,
        sample_tokens=(1, min(lengths)),
        tokens_per_step=lambda program: order.batch_size * lengths[program],
        program_at=order.program_at,
        inputs=_make_inputs(order, draws, int(config.steps_per_call)),
        batch=_make_batch(order),
        loss=loss,
        evaluate=make_evaluate(
            test,
            int(config.data.test_batch_size),
            zoology=zoology,
            cache_dir=cache_dir,
            include_slices=config.data.get("include_slices", True),
        ),
        best=("eval/accuracy", "max"),
        state_length=max(segment.length for segment in test),
    )


def check(config: ConfigDict) -> None:
    """What `build` would refuse, without drawing anything."""
    probe = from_plain(to_plain(config))
    probe.data.mode = "device"
    build(probe)


def loss(
    model: nn.Module, params: Params, batch: Batch, rng: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    """Mean cross-entropy over the labels, plus every auxiliary loss that a layer sowed into `losses`.

    The head runs on the labelled positions only: 4 of 64 at (64, 4). Metrics: loss (the cross-entropy), accuracy (mean over
    rows of the share of labels that are right), aux_loss where layers sow one.
    """
    hidden, auxiliary = hidden_states(model, params, batch["tokens"], rng)
    b, n = batch["labels"].shape
    rows = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)
    head = lambda p, r: model.apply({"params": p}, r, method="head")
    total, correct = cross_entropy(
        head, params, rows.reshape(b * n, -1), batch["labels"].reshape(-1)
    )
    labels, examples = jnp.float32(b * n), jnp.float32(b)
    metrics = {
        "loss": (total, labels),
        "accuracy": (jnp.sum(correct.astype(jnp.float32)) / n, examples),
    }
    if auxiliary is None:
        return total / labels.astype(total.dtype), metrics
    metrics["aux_loss"] = (auxiliary * examples, examples)
    return total / labels.astype(total.dtype) + auxiliary, metrics


def segments_of(config: ConfigDict) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """The training and the test segments of a config, each with a seed of its own (mqar_zoology.segment_seeds)."""
    data = config.data
    default = mqar_zoology.PAPER_SEED if data.mode == "zoology" else config.seed
    seed = data.get("seed", None)
    seeds = mqar_zoology.segment_seeds(
        int(default if seed is None else seed), len(data.train), len(data.test)
    )
    shared = {key: data[key] for key in ("power_a", "random_non_queries", "num_passes")}
    shared["vocab_size"] = config.model.vocab_size
    train, test = (
        parse_segments(f"config.data.{split}", data[split], shared, split_seeds)
        for split, split_seeds in zip(("train", "test"), seeds)
    )
    if not train:
        raise UserError("config.data.train is empty; it needs at least one segment")
    if len(train) > 1 or data.mode == "zoology":
        why = "has others beside it" if data.mode != "zoology" else "is drawn ahead of time"
        _forbid_endless("config.data.train", train, why)
    return train, test


def parse_segments(
    where: str, listed: Sequence[Any], shared: Mapping[str, Any], seeds: Sequence[int]
) -> tuple[Segment, ...]:
    """Segments from the dicts of a config: `shared` fields, overridden by each dict's own, and a seed each.

    Raises:
      UserError: `where[i]: ` and what is wrong, in one line.
    """
    out = []
    for i, (given, seed) in enumerate(zip(listed, seeds)):
        place = f"{where}[{i}]"
        if not isinstance(given, Mapping | ConfigDict):
            raise UserError(
                f"{place} must be {{'length': ..., 'num_kv_pairs': ...}}, got {given!r}"
            )
        for key, value in given.items():
            _check_entry(place, key, value)
        for key in ("length", "num_kv_pairs"):
            if key not in given:
                raise UserError(f"{place} needs {key}")
        try:
            out.append(Segment(**{**shared, **dict(given), "seed": seed}))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
    return tuple(out)


def _check_entry(place: str, key: Any, value: Any) -> None:
    if key not in _SEGMENT_KEYS:
        near = difflib.get_close_matches(str(key), _SEGMENT_KEYS, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(_SEGMENT_KEYS)}"
        raise UserError(f"{place} has no key {key!r}; {hint}")
    kinds = _SEGMENT_KEYS[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"{place}.{key} must be {names}, got {value!r}")


def _forbid_endless(where: str, segments: Sequence[Segment], why: str) -> None:
    for i, segment in enumerate(segments):
        if segment.num_examples is None:
            raise UserError(
                f"{where}[{i}] is endless (num_examples=None) but {why}; give it a number"
            )


def _check_periods(order: Order) -> None:
    for i, segment in enumerate(order.segments):
        if math.lcm(segment.num_examples or 1, order.batch_size) > 2**32:
            raise UserError(
                f"config.data.train[{i}]: num_examples {segment.num_examples} and batch_size {order.batch_size} repeat only "
                "after more than 2^32 examples; use a multiple of the batch size, or num_examples=None"
            )


def _make_inputs(
    order: Order, draws: Sequence[mqar_zoology.Draws] | None, steps_per_call: int
) -> Callable[[int, int], Any]:
    def inputs(first: int, count: int) -> dict[str, Int[np.ndarray, "steps b n"]]:
        if draws is None:
            return {}
        index, _ = order.program_at(first)
        # always the same shape, so that a shorter call is the same program; the steps past count are not read
        rows = order.host_indices(index, first, max(count, steps_per_call))
        return {name: array[rows] for name, array in draws[index].items()}

    return inputs


def _make_batch(order: Order) -> Callable[[Any, Any, Array, Array], Batch]:
    def batch(program: int, inputs: Any, step: Array, offset: Array) -> Batch:
        segment = order.segments[program]
        indices = order.indices(program, step)
        if not inputs:
            return mqar.examples(segment, indices)
        drawn = {name: jnp.take(array, offset, axis=0) for name, array in inputs.items()}
        filler = mqar.fill(segment, indices) if segment.random_non_queries else None
        return mqar.assemble(segment, **drawn, filler=filler)

    return batch
