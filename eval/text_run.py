"""A text model as it lies in a run directory: config, tokenizer, parameters. Not a task of its own."""

import dataclasses
from pathlib import Path
from typing import Any

from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextRun:
    """What evaluation and generation need of a run."""

    config: Any
    tokenizer: Any
    model: Any
    params: Any
    step: int


def read_text_run(checkpoint: str | Path, step: str, tokenizer_path: Path | None = None) -> TextRun:
    """Reads config.json, tokenizer.json (or the file at tokenizer_path) and the parameters of a step: best, latest or a number.

    Raises:
      UserError: no run of text there, no whole checkpoint, no such step, a tokenizer of another vocabulary.
    """
    if step not in ("best", "latest") and not step.isdecimal():
        raise UserError(f"--step must be best, latest or a number, got {step!r}")

    import jax
    import jax.numpy as jnp

    from train.checkpoint import load_params
    from train.loop import build_model
    from train.read_run import read_config
    from train.tasks.text import read_tokenizer

    config = read_config(checkpoint)
    if config.task != "text":
        raise UserError(f"{checkpoint} was trained on {config.task!r}, not on text")
    tokenizer = read_tokenizer(checkpoint)
    if tokenizer_path is not None and tokenizer is not None:
        tokenizer = other_tokenizer(tokenizer_path, tokenizer)
    model = build_model(config)
    tokens = jnp.zeros((1, min(int(config.data.length), 16)), jnp.int32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    restored = load_params(checkpoint, int(step) if step.isdecimal() else step, abstract)
    return TextRun(config, tokenizer, model, restored.tree, restored.step)


def other_tokenizer(path: Path, trained_with: Any) -> Any:
    """The tokenizer of a file, if it has the vocabulary that the model was trained with.

    Raises:
      UserError: it has another; the first difference is named.
    """
    from train.data.text import load_tokenizer

    tokenizer = load_tokenizer(str(path))
    ours, theirs = trained_with.vocab_size, tokenizer.vocab_size
    if ours != theirs:
        raise UserError(
            f"--tokenizer {path} has {theirs} tokens and the checkpoint was trained with {ours}; leave --tokenizer out to take "
            "the one of the run"
        )
    if tokenizer.to_json() != trained_with.to_json():
        raise UserError(
            f"--tokenizer {path} is another vocabulary than the one the checkpoint was trained with; leave --tokenizer out"
        )
    return tokenizer
