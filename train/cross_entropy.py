"""Cross-entropy through a wide vocabulary head, without ever holding [rows, vocabulary].

The head and the loss are by far the largest arrays of a small language model: 1024 labelled positions and a vocabulary of
8192 make 32 MiB of logits, which plain differentiation writes and reads half a dozen times. Here a chunk of rows goes
through head, softmax and the head's pullback while its logits are in cache; what is kept is the gradient itself, as large
as the rows and the head's parameters. The gradient is linear in the cotangent of the sum, so the forward pass can
compute it before the cotangent is known.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

Head = Callable[[Any, Array], Array]  # (params, rows [c, d]) -> logits [c, V]; each row on its own

# Logits of one chunk, in elements. A CPU wants them in cache: 128 rows at V = 8192 were the fastest (measured). An
# accelerator wants large products, and only its memory is the limit.
_CPU_CHUNK, _CPU_LEAST_ROWS = 2**20, 32
_DEVICE_CHUNK, _DEVICE_LEAST_ROWS = 2**26, 256


def cross_entropy(
    head: Head, params: PyTree, rows: Float[Array, "n d"], labels: Int[Array, "n"]
) -> tuple[Float[Array, ""], Bool[Array, "n"]]:
    """Sum over rows of -log softmax(head(params, row))[label], and which rows are answered correctly.

    A negative label means no label: the row adds nothing to the sum or to any gradient, and is not correct. A label of V
    or more is read as V - 1. A row is correct when its label's logit is larger than every other one; a tie is wrong (an
    argmax would call a constant answer right wherever the label is token 0).
    Sum and softmax in promote_types(logits, float32). Differentiable once, in reverse, through the sum.
    """
    leaves, treedef = jax.tree.flatten(params)
    used = _used_leaves(head, params, rows)

    def from_used(given: list[Array], rows: Array) -> Array:
        replaced = iter(given)
        # what the head does not read is dead code, but must not be a tracer of the caller's
        full = [next(replaced) if u else jnp.zeros(x.shape, x.dtype) for u, x in zip(used, leaves)]
        return head(jax.tree.unflatten(treedef, full), rows)

    given = [x for u, x in zip(used, leaves) if u]
    return _summed(from_used, given, rows, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(head: Head, params: Any, rows: Array, labels: Array) -> tuple[Array, Array]:
    def statistics(params: Any, chunk: tuple[Array, Array]) -> tuple[Any, Any]:
        chunk_rows, chunk_labels = chunk
        logits = _float32(head(params, chunk_rows))
        loss, correct, _ = _row_loss(logits, chunk_labels)
        return params, (loss, correct)

    _, (loss, correct) = _over_chunks(statistics, lambda p: p, head, params, rows, labels)
    return jnp.sum(loss), correct


def _summed_forward(head: Head, params: Any, rows: Array, labels: Array) -> tuple[Any, Any]:
    turn = _turned(params)

    def gradient(total: Any, chunk: tuple[Array, Array]) -> tuple[Any, Any]:
        chunk_rows, chunk_labels = chunk
        of_turned = lambda t, r: _float32(head(turn(t), r))
        logits, pullback = jax.vjp(of_turned, turn(params), chunk_rows)
        loss, correct, d_logits = _row_loss(logits, chunk_labels)
        d_turned, d_rows = pullback(d_logits)
        return jax.tree.map(lambda t, d: t + d, total, d_turned), (loss, correct, d_rows)

    zeros = lambda p: jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x.dtype)), turn(p))
    d_turned, (loss, correct, d_rows) = _over_chunks(gradient, zeros, head, params, rows, labels)
    d_params = jax.tree.map(lambda d, x: d.astype(x.dtype), turn(d_turned), params)
    return (jnp.sum(loss), correct), (d_params, d_rows)


def _summed_backward(head: Head, gradients: Any, cotangents: Any) -> tuple[Any, Any, None]:
    scale = lambda d: (d * cotangents[0]).astype(d.dtype)
    d_params, d_rows = jax.tree.map(scale, gradients)
    return d_params, d_rows, None


_summed.defvjp(_summed_forward, _summed_backward)


def _row_loss(logits: Array, labels: Array) -> tuple[Array, Array, Array]:
    """[c, V] logits -> loss [c], correct [c], and d loss / d logits [c, V] = softmax - one-hot."""
    labelled = labels >= 0
    index = jnp.clip(labels, 0, logits.shape[-1] - 1)[:, None]
    hit = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1) == index
    own = jnp.take_along_axis(logits, index, axis=1)[:, 0]
    rest = jnp.max(jnp.where(hit, -jnp.inf, logits), axis=1)
    largest = jnp.maximum(own, rest)
    powers = jnp.exp(logits - largest[:, None])
    total = jnp.sum(powers, axis=1)
    loss = jnp.where(labelled, jnp.log(total) + largest - own, 0)
    gradient = powers * (labelled / total)[:, None] - (hit & labelled[:, None])
    return loss, labelled & (own > rest), gradient


def _over_chunks(
    body: Callable[[Any, Any], tuple[Any, Any]],
    start: Callable[[Any], Any],
    head: Head,
    params: Any,
    rows: Array,
    labels: Array,
) -> tuple[Any, Any]:
    """lax.scan of body over chunks of rows, sized for the platform; the stacked outputs come back as rows.

    Chunk i takes the rows i, i + chunks, i + 2 chunks, ...: rows that are sharded over devices in contiguous blocks stay
    where they are, and every device works on every chunk.
    """
    n = rows.shape[0]
    width = jax.eval_shape(head, params, rows).shape[-1]

    def run(params: Any, rows: Array, labels: Array, *, size: int) -> tuple[Any, Any]:
        chunks = max(1, -(-n // size))
        each = -(-n // chunks)
        padding = chunks * each - n
        # an unlabelled row must not reach the sums, whatever it holds
        rows = jnp.where((labels >= 0)[:, None], rows, 0)
        rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(each, chunks, -1)
        labels = jnp.pad(labels, (0, padding), constant_values=-1).reshape(each, chunks)
        split = (jnp.swapaxes(rows, 0, 1), labels.T)
        carry, out = jax.lax.scan(body, start(params), split)
        join = lambda x: jnp.swapaxes(x, 0, 1).reshape(chunks * each, *x.shape[2:])[:n]
        return carry, jax.tree.map(join, out)

    sized = lambda limit, least: functools.partial(run, size=max(limit // width, least))
    cpu, device = sized(_CPU_CHUNK, _CPU_LEAST_ROWS), sized(_DEVICE_CHUNK, _DEVICE_LEAST_ROWS)
    return jax.lax.platform_dependent(params, rows, labels, cpu=cpu, default=device)


def _used_leaves(head: Head, params: Any, rows: Array) -> list[bool]:
    """Which leaves of the parameters the head reads, so that the others cost nothing."""
    jaxpr = jax.make_jaxpr(head)(params, rows).jaxpr
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    read |= {id(v) for v in jaxpr.outvars}
    return [id(v) in read for v in jaxpr.invars[: len(jax.tree.leaves(params))]]


def _turned(params: Any) -> Callable[[Any], Any]:
    """A function, its own inverse, that transposes the matrices with more rows than columns: embeddings [V, d].

    The gradient of a tied embedding is then summed as [d, V] = rows^T d_logits, which XLA's CPU products do three times as
    fast as [V, d] = d_logits^T rows (measured: 7 ms and 21 ms for 1024 rows, d 64, V 8192).
    """
    tall = jax.tree.map(lambda x: x.ndim == 2 and x.shape[0] > x.shape[1], params)
    return lambda tree: jax.tree.map(lambda x, t: x.T if t else x, tree, tall)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _float32(x: Array) -> Array:
    return x.astype(_wide(x.dtype))
