"""Loss of a model on held-out text: nats per token, perplexity, bits per byte."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Int

from jaxmodels.typing import Params
from train.cross_entropy import cross_entropy
from train.sharding import rows_over

Evaluate = Callable[[nn.Module, Params], dict[str, float]]


def make_evaluate(
    rows: Int[np.ndarray, "n t1"],
    batch_size: int,
    *,
    end: int | None = None,
    token_bytes: Int[np.ndarray, " vocab"] | None = None,
    tick: Callable[[int], None] = lambda count: None,
) -> Evaluate:
    """A function (model, params) -> metrics over all rows; `rows` are tokens and the label of the last one, -1 where there is none.

    eval/loss: mean over labels of -log p(label | what stands before it in its row and document), in nats.
    eval/perplexity: its exponential. eval/bits_per_byte: the sum of -log2 p over the UTF-8 bytes that the labels stand for;
    the ends of documents are predicted too, and stand for no byte. Left out where token_bytes is not known.

    end: the token before every document; None where the rows hold one document.
    token_bytes: the bytes that each token stands for.
    tick(rows done) is called now and then, for a progress bar.
    """
    missing = -len(rows) % batch_size
    padded = np.concatenate([rows, np.full((missing, rows.shape[1]), -1, rows.dtype)])
    batches = padded.reshape(-1, batch_size, rows.shape[1]).astype(np.int32)
    labels = rows[:, 1:][rows[:, 1:] >= 0]
    text_bytes = 0 if token_bytes is None else int(token_bytes[labels].sum())
    compiled: dict[int, tuple[nn.Module, Callable[..., Array]]] = {}

    def evaluate(model: nn.Module, params: Params) -> dict[str, float]:
        if id(model) not in compiled:
            compiled.clear()
            compiled[id(model)] = (model, _batch_program(model, end))
        program = compiled[id(model)][1]
        over = rows_over(params, batch_size)
        total, queued = 0.0, []
        for i, batch in enumerate(batches):
            queued.append(program(params, batch, over=over))
            if len(queued) > 2:  # the device has work, and the host does not run ahead
                total += float(queued.pop(0))
            tick(min((i + 1) * batch_size, len(rows)))
        total += sum(float(x) for x in queued)
        mean = total / len(labels)
        metrics = {"eval/loss": mean, "eval/perplexity": math.exp(min(mean, 700.0))}
        if text_bytes:
            metrics["eval/bits_per_byte"] = total / math.log(2) / text_bytes
        return metrics

    return evaluate


def _batch_program(model: nn.Module, end: int | None) -> Callable[..., Array]:
    def program(params: Params, rows: Array, over: Any) -> Array:
        if over is not None:
            rows = jax.lax.with_sharding_constraint(rows, over)
        tokens, labels = jnp.maximum(rows[:, :-1], 0), rows[:, 1:]
        ids = None if end is None else segment_ids_of(tokens, end)
        hidden, _ = model.apply({"params": params}, tokens, segment_ids=ids, method="hidden")
        head = lambda p, r: model.apply({"params": p}, r, method="head")
        flat = hidden.reshape(labels.size, -1)
        return cross_entropy(head, params, flat, labels.reshape(-1))[0]

    return jax.jit(program, static_argnames="over")


def segment_ids_of(tokens: Int[Array, "b t"], end: int) -> Int[Array, "b t"]:
    """1 from the first token of a row, one more from every `end` on."""
    return 1 + jnp.cumsum(tokens == end, axis=1, dtype=jnp.int32)
