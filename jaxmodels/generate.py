"""Batched sampling over recurrent state: one prefill, then one token per call of the same model.

The state is whatever `model.init_state` says: constant for a recurrence, growing with max_len for attention.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxmodels.models.language_model import LanguageModel
from jaxmodels.typing import Params


def generate(
    model: LanguageModel,
    params: Params,
    prompt: Int[Array, "b p"],
    *,
    max_new_tokens: int,
    lengths: Int[Array, " b"] | None = None,
    key: PRNGKeyArray | None = None,
    temperature: float | int = 1.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    end_token: int | None = None,
) -> Int[Array, "b n"]:
    """n = max_new_tokens tokens that follow each prompt; token i is drawn from softmax(logits / temperature), cut by `filter_logits`.

    lengths: real tokens of each prompt, which stand at its beginning; the rest of the row is not read. None: all of them.
    key: of the random numbers; the same key gives the same tokens. May be None at temperature 0.
    temperature: 0 takes the likeliest token (greedy). top_k 0 and top_p 1 keep every token.
    end_token: a row that drew it goes on with it; when every row did, decoding stops.

    One program per (model, shapes, max_new_tokens, top_k, top_p, end_token): prefill is one call of the model on the prompts,
    decoding a loop of calls with one token that carries the state.

    Raises ValueError for an empty prompt, numbers out of range, lengths outside 1..p (when concrete), a missing key, or more
    tokens than the model has learned positions for.
    """
    b, p = prompt.shape
    if p < 1 or b < 1:
        raise ValueError(f"the prompt must hold at least one token, got shape {prompt.shape}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    _check_filter(top_k, top_p)
    if temperature > 0 and key is None:
        raise ValueError("sampling needs a key; give one, or temperature=0 for the likeliest token")
    if model.max_positions and p + max_new_tokens > model.max_positions:
        raise ValueError(
            f"{p} prompt tokens and {max_new_tokens} new ones do not fit the {model.max_positions} learned positions"
        )
    if lengths is not None and not isinstance(lengths, Tracer):
        given = np.asarray(lengths)
        if given.shape != (b,) or given.min() < 1 or given.max() > p:
            raise ValueError(f"lengths must be {b} numbers from 1 to {p}, got {given.tolist()}")
    return _generate(
        params,
        prompt,
        lengths,
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        model=model,
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        top_k=top_k,
        top_p=float(top_p),
        end_token=end_token,
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "greedy", "top_k", "top_p", "end_token"),
)
def _generate(
    params: Params,
    prompt: Int[Array, "b p"],
    lengths: Int[Array, " b"] | None,
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    *,
    model: LanguageModel,
    max_new_tokens: int,
    greedy: bool,
    top_k: int,
    top_p: float,
    end_token: int | None,
) -> Int[Array, "b n"]:
    b, p = prompt.shape
    state = model.init_state(b, p + max_new_tokens)
    last = jnp.full(b, p - 1) if lengths is None else lengths - 1
    segment_ids = None if lengths is None else (jnp.arange(p) <= last[:, None]).astype(jnp.int32)
    hidden, state = model.apply({"params": params}, prompt, state, segment_ids, method="hidden")
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)

    def draw(hidden: Float[Array, "b 1 d"], i: Int[Array, ""]) -> Int[Array, " b"]:
        logits = jnp.asarray(model.apply({"params": params}, hidden[:, 0], method="head"))
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filter_logits(logits / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, i), logits).astype(jnp.int32)

    def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
        i, ended = carry[0], carry[1]
        return (i < max_new_tokens) & ~jnp.all(ended)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, ended, out, hidden, state = carry
        token = draw(hidden, i)
        if end_token is not None:
            token = jnp.where(ended, end_token, token)
            ended = ended | (token == end_token)
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], i, axis=1)
        ones = None if segment_ids is None else jnp.ones((b, 1), jnp.int32)
        hidden, state = model.apply(
            {"params": params}, token[:, None], state, ones, method="hidden"
        )
        return i + 1, ended, out, hidden, state

    fill = 0 if end_token is None else end_token
    out = jnp.full((b, max_new_tokens), fill, jnp.int32)
    start = (jnp.zeros((), jnp.int32), jnp.zeros(b, bool), out, hidden, state)
    return jax.lax.while_loop(unfinished, body, start)[2]


def filter_logits(
    logits: Float[Array, "*rows vocab"], top_k: int = 0, top_p: float | int = 1.0
) -> Float[Array, "*rows vocab"]:
    """-inf for all but the top_k largest logits (0: all), and then for all but the nucleus: the fewest largest ones whose
    probabilities add up to at least top_p (arXiv 1904.09751). Ties with the smallest that is kept are kept.

    Raises ValueError for top_k < 0 or top_p outside (0, 1].
    """
    _check_filter(top_k, top_p)
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _check_filter(top_k: int, top_p: float | int) -> None:
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all) or positive, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
