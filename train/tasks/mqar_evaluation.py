"""Accuracy and loss of a model on MQAR test segments."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from jaxmodels.typing import Params
from train.cross_entropy import cross_entropy
from train.data import mqar, mqar_zoology
from train.data.mqar import Segment
from train.errors import UserError
from train.sharding import rows_over

Evaluate = Callable[[nn.Module, Params], dict[str, float]]


def make_evaluate(
    segments: Sequence[Segment],
    batch_size: int,
    *,
    zoology: bool = False,
    cache_dir: str | Path | None = None,
    include_slices: bool = True,
) -> Evaluate:
    """A function (model, params) -> metrics over all examples of all segments.

    eval/accuracy: mean over examples of the share of their labels that are right (as the original: a segment counts by its
    examples, not by its labels). eval/loss: mean over examples of their mean cross-entropy. With include_slices also
    eval/accuracy/L64-kv4 and eval/loss/L64-kv4 per segment; segments of one name are pooled.

    Every segment is one compiled program that loops over its batches, kept for as long as the same model object is asked
    about. Rows are spread over the mesh of the parameters where the batch divides by it. The sums do not depend on the
    batch size, except in the last bits of the loss.

    Raises:
      UserError: no segment, or an endless one.
    """
    if not segments:
        raise UserError("config.data.test is empty; it needs at least one segment")
    for i, segment in enumerate(segments):
        if segment.num_examples is None:
            raise UserError(
                f"config.data.test[{i}] is endless (num_examples=None); a test needs a number"
            )
    inputs = [_test_rows(s, batch_size, zoology, cache_dir) for s in segments]
    compiled: dict[int, tuple[nn.Module, list[Callable[..., Any]]]] = {}

    def evaluate(model: nn.Module, params: Params) -> dict[str, float]:
        if id(model) not in compiled:
            compiled.clear()
            programs = [_segment_program(model, s, batch_size) for s in segments]
            compiled[id(model)] = (model, programs)
        sums = [
            program(params, rows, over=rows_over(params, batch_size))
            for program, rows in zip(compiled[id(model)][1], inputs)
        ]
        return _report(segments, jax.device_get(sums), include_slices)

    return evaluate


def slice_name(segment: Segment) -> str:
    """L64-kv4"""
    return f"L{segment.length}-kv{segment.num_kv_pairs}"


def _test_rows(
    segment: Segment, batch_size: int, zoology: bool, cache_dir: str | Path | None
) -> dict[str, Int[np.ndarray, "..."]]:
    """indices [batches, b], -1 past the last example, and in zoology mode the host's draws of these rows."""
    n = segment.num_examples or 0
    batches = -(-n // batch_size)
    index = np.arange(batches * batch_size)
    indices = np.where(index < n, index, -1).astype(np.int32).reshape(batches, batch_size)
    if not zoology:
        return {"indices": indices}
    draws = mqar_zoology.load(segment, cache_dir)
    # rows past the last example repeat it; they have index -1 and are not counted
    return {"indices": indices} | {
        k: v[np.minimum(index, n - 1)].reshape(batches, batch_size, -1) for k, v in draws.items()
    }


def _segment_program(model: nn.Module, segment: Segment, batch_size: int) -> Callable[..., Any]:
    def one_batch(params: Params, rows: dict[str, Array], over: NamedSharding | None) -> Any:
        indices = jnp.maximum(rows["indices"], 0).astype(jnp.uint32)
        batch = _batch(segment, rows, indices)
        if over is not None:
            batch = jax.lax.with_sharding_constraint(batch, over)
        hidden, _ = model.apply({"params": params}, batch["tokens"], method="hidden")
        picked = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)
        labels = jnp.where(rows["indices"][:, None] >= 0, batch["labels"], -1)
        head = lambda p, r: model.apply({"params": p}, r, method="head")
        total, correct = cross_entropy(
            head, params, picked.reshape(labels.size, -1), labels.reshape(-1)
        )
        return total, jnp.sum(correct, dtype=jnp.int32)

    def program(params: Params, rows: dict[str, Array], over: NamedSharding | None) -> Any:
        return jax.lax.map(lambda r: one_batch(params, r, over), rows)

    return jax.jit(program, static_argnames="over")


def _batch(segment: Segment, rows: dict[str, Array], indices: Array) -> dict[str, Array]:
    if "keys" not in rows:
        return mqar.examples(segment, indices)
    filler = mqar.fill(segment, indices) if segment.random_non_queries else None
    return mqar.assemble(segment, rows["keys"], rows["values"], rows["slots"], filler)


def _report(
    segments: Sequence[Segment],
    sums: list[tuple[Float[np.ndarray, "_"], Int[np.ndarray, "_"]]],
    include_slices: bool,
) -> dict[str, float]:
    """Means over examples; sums of batches in float64 on the host."""
    totals: dict[str, np.ndarray] = {}
    for segment, (loss, correct) in zip(segments, sums):
        per_example = np.array([np.sum(loss, dtype=np.float64), np.sum(correct, dtype=np.float64)])
        row = np.append(per_example / segment.num_kv_pairs, segment.num_examples or 0)
        names = ("", "/" + slice_name(segment)) if include_slices else ("",)
        for name in names:
            totals[name] = totals.get(name, 0) + row
    out = {}
    for name, (loss, correct, count) in totals.items():
        out[f"eval/accuracy{name}"] = float(correct / count)
        out[f"eval/loss{name}"] = float(loss / count)
    return out
