"""Next-token prediction on real text, in rows of packed documents.

Every document stands in the stream as [end, t_1, ..., t_n], so that its first token is predicted from `end` and its end from
t_n: each position of a row has a label, the token after it. A row holds pieces of several documents; segment ids, counted on
the device from the places of `end`, keep them apart.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Int, PRNGKeyArray
from ml_collections import ConfigDict

from jaxmodels.generate import generate
from jaxmodels.typing import Params
from train.cross_entropy import cross_entropy
from train.errors import UserError
from train.tasks.forward import hidden_states
from train.tasks.task import FOREVER, Batch, Metrics, Task
from train.tasks.text_evaluation import make_evaluate, segment_ids_of

SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 200, 0.8


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads: the two parts of the stream (train.data.text.Corpus), and what is known of their tokens.

    tokenizer: None for tokens that came without one.
    """

    train: Any
    held_out: Any
    tokenizer: Any

    @property
    def end(self) -> int | None:
        """The token that separates documents; None where there is only one, so that nobody looks for it."""
        documents = max(len(self.train.starts), len(self.held_out.starts))
        return self.tokenizer.end if self.tokenizer and documents > 1 else None

    @property
    def token_bytes(self) -> Any:
        return self.tokenizer and self.tokenizer.token_bytes


def build(config: ConfigDict) -> Task:
    """The task of a run config. Reads config.data, config.model.vocab_size, batch_size, steps_per_call and seed.

    Tokenises the text, or finds its tokens in the cache.

    Raises:
      UserError: one line, for text that is not there, cannot be read, or is shorter than a row; a vocabulary too small.
    """
    from train.data.text import TrainRows, held_out_rows, make_iterator

    data = load_data(config)
    length, batch_size = int(config.data.length), int(config.batch_size)
    rows = TrainRows(data.train, length, seed=data_seed(config))
    shard = (jax.process_index(), jax.process_count())
    iterator = make_iterator(rows, batch_size, shard=shard)
    test, _ = held_out_rows(data.held_out, length)
    return Task(
        name="text",
        batch_size=batch_size,
        sample_tokens=(1, min(length, 16)),
        tokens_per_step=lambda program: batch_size * length,
        program_at=lambda step: (data.end, FOREVER),
        inputs=_make_inputs(iterator, int(config.steps_per_call)),
        batch=make_batch,
        loss=loss,
        evaluate=make_evaluate(
            test, int(config.data.test_batch_size), end=data.end, token_bytes=data.token_bytes
        ),
        best=("eval/loss", "min"),
        state_length=length,
        iterator=iterator,
        files={"tokenizer.json": data.tokenizer.to_json()} if data.tokenizer else {},
        sample=_make_sample(data.tokenizer, config) if data.tokenizer else None,
    )


def check(config: ConfigDict) -> None:
    """What can be said before any text is read: sizes, the files that are there, the tokenizer's vocabulary."""
    from train.data.text import load_tokenizer, resolve

    data = config.data
    if data.length < 2:
        raise UserError(f"config.data.length must be at least 2, got {data.length}")
    if not 0 < data.held_out < 1:
        raise UserError(f"config.data.held_out must be between 0 and 1, got {data.held_out}")
    if data.errors not in ("strict", "replace"):
        raise UserError(f"config.data.errors must be strict or replace, got {data.errors!r}")
    source = resolve(data.path, **_reading(config))
    if data.validation_path:
        resolve(data.validation_path, **_reading(config))
    if data.tokenizer == "bpe":
        if config.model.vocab_size < 257:
            raise UserError(
                "config.model.vocab_size must be at least 257 to train a byte-level BPE, got "
                f"{config.model.vocab_size}"
            )
    elif not (data.tokenizer == "bytes" and source.holds_tokens):
        check_vocabulary(load_tokenizer(data.tokenizer), config)


def load_data(config: ConfigDict, tokenizer: Any = None) -> Data:
    """The text of a config as tokens, split into what is trained on and what is held out.

    tokenizer: the one to use instead of what config.data.tokenizer names, as for the text of a trained model. Tokens that
    are given as such (.npy) with the default tokenizer, bytes, belong to none.
    """
    from train.data.text import check_ids, resolve, split, tokenizer_of, tokens_of

    data = config.data
    source = resolve(data.path, **_reading(config))
    if tokenizer is None:
        size = int(config.model.vocab_size)
        tokenizer = tokenizer_of(data.tokenizer, source, size, cache_dir=data.cache_dir)
    train = tokens_of(source, tokenizer, cache_dir=data.cache_dir)
    if data.validation_path:
        validation = resolve(data.validation_path, **_reading(config))
        held_out = tokens_of(validation, tokenizer, cache_dir=data.cache_dir)
        if validation.holds_tokens:
            check_ids(held_out, config.model.vocab_size, data.validation_path)
    if source.holds_tokens:
        check_ids(train, config.model.vocab_size, data.path)
        if tokenizer.name == "bytes":
            tokenizer = None
    if tokenizer is not None:
        check_vocabulary(tokenizer, config)
    if not data.validation_path:
        train, held_out = split(train, data.held_out)
    return Data(train, held_out, tokenizer)


def check_vocabulary(tokenizer: Any, config: ConfigDict) -> None:
    """UserError unless the model has a row for every token."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens and the model "
            f"config.model.vocab_size={config.model.vocab_size}; set it to {tokenizer.vocab_size} or more"
        )


def data_seed(config: ConfigDict) -> int:
    """config.data.seed, or the run's."""
    return int(config.seed if config.data.seed is None else config.data.seed)


def loss(
    model: nn.Module, params: Params, batch: Batch, rng: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    """Mean cross-entropy (nats per token) over every position, plus every auxiliary loss that a layer sowed.

    The head runs in chunks of rows: [tokens, vocabulary] logits are never held.
    """
    hidden, auxiliary = hidden_states(model, params, batch["tokens"], rng, batch.get("segment_ids"))
    head = lambda p, r: model.apply({"params": p}, r, method="head")
    labels = batch["labels"].reshape(-1)
    total, _ = cross_entropy(head, params, hidden.reshape(labels.size, -1), labels)
    count = jnp.float32(labels.size)
    metrics = {"loss": (total, count)}
    mean = total / count.astype(total.dtype)
    if auxiliary is None:
        return mean, metrics
    return mean + auxiliary, metrics | {"aux_loss": (auxiliary * count, count)}


def _make_inputs(iterator: Any, steps_per_call: int) -> Callable[[int, int], Any]:
    def inputs(first: int, count: int) -> dict[str, Int[np.ndarray, "steps b t"]]:
        # asked for the steps in order it only goes on; a look at the shapes before the first step must not cost a batch
        if iterator.get_state()["next_index"] != first:
            iterator.set_state({"next_index": first})
        batches = [next(iterator) for _ in range(count)]
        # always the same shape, so that a shorter call is the same program; the steps past count are not read
        padding = [np.zeros_like(batches[0])] * (max(count, steps_per_call) - count)
        return {"rows": np.stack(batches + padding)}

    return inputs


def make_batch(end: int | None, inputs: Any, step: Array, offset: Array) -> Batch:
    rows = jnp.take(inputs["rows"], offset, axis=0)
    tokens, labels = rows[:, :-1], rows[:, 1:]
    batch = {"tokens": tokens, "labels": labels}
    return batch if end is None else batch | {"segment_ids": segment_ids_of(tokens, end)}


def _make_sample(tokenizer: Any, config: ConfigDict) -> Callable[[nn.Module, Params], str]:
    """A continuation of config.data.sample_prompt, as long as a row."""

    def sample(model: nn.Module, params: Params) -> str:
        prompt = encode_prompt(tokenizer, config.data.sample_prompt)
        count = min(SAMPLE_TOKENS, int(config.data.length) - prompt.shape[1])
        if count < 1:
            raise UserError("config.data.sample_prompt is longer than config.data.length tokens")
        tokens = generate(
            model,
            params,
            prompt,
            max_new_tokens=count,
            key=jax.random.key(config.seed),
            temperature=SAMPLE_TEMPERATURE,
            end_token=tokenizer.end,
        )
        return config.data.sample_prompt + decode_until_end(tokenizer, np.asarray(tokens)[0])

    return sample


def encode_prompt(tokenizer: Any, text: str) -> Int[Array, "1 p"]:
    """[end, tokens of the text], as documents begin in training."""
    return jnp.asarray([[tokenizer.end, *tokenizer.encode_batch([text])[0].tolist()]], jnp.int32)


def decode_until_end(tokenizer: Any, tokens: Int[np.ndarray, " n"]) -> str:
    """The text of tokens up to the first `end`."""
    ends = np.flatnonzero(tokens == tokenizer.end)
    return tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)


def _reading(config: ConfigDict) -> dict[str, Any]:
    """How files are read, as keyword arguments of `train.data.text.resolve`."""
    keys = ("text_field", "separator", "errors", "max_bad_lines")
    return {key: config.data[key] for key in keys}


def read_tokenizer(workdir: str | Path) -> Any:
    """The tokenizer a run was trained with; None where it was trained on tokens that came without one.

    Raises:
      UserError: a file that cannot be read.
    """
    from train.data.text import from_bytes

    path = Path(workdir) / "tokenizer.json"
    return from_bytes(str(path), path.read_bytes()) if path.is_file() else None
