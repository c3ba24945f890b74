"""Run configs: every key with its default and meaning, the runs of a suite, and the way to JSON and back.

A config file (configs/) is a Python file whose `get_config()` starts from `base_config()` and sets what its claim needs.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from train.config_paths import Config, deep_copy, set_key, to_plain
from train.errors import UserError

# fmt: off
# (path, default, meaning), a key per line. 0 or "" switches off whatever a key limits, so that a default has its key's type.
KEYS: tuple[tuple[str, Any, str], ...] = (
    ("task", "mqar", "which task of train/tasks to train"),
    ("steps", 1000, "training steps (optimiser updates)"),
    ("seed", 0, "seed of initialisation, data and dropout"),
    ("batch_size", 256, "sequences per step, over all devices"),
    ("learning_rate", 1e-3, "peak learning rate"),
    ("steps_per_call", 32, "steps in one compiled program; changes speed, never results"),
    ("max_bad_steps", 20, "consecutive steps with a non-finite gradient before the run ends with an error"),
    ("compilation_cache", "", "directory of compiled programs; empty = the user's cache directory, off = none"),
    ("model.vocab_size", 8192, "vocabulary, which is also the head's width"),
    ("model.d_model", 64, "model width"),
    ("model.num_layers", 2, "layers; layer i uses mixers[i mod len(mixers)]"),
    ("model.mixers", [{"name": "attention"}], "sequence mixers: {'name': ..., and the fields of that mixer}"),
    ("model.channel", "identity", "channel mixer after each sequence mixer: identity, mlp or swiglu"),
    ("model.channel_multiplier", 4.0, "hidden width of the channel mixer over d_model"),
    ("model.norm", "layernorm", "layernorm or rmsnorm"),
    ("model.norm_epsilon", 1e-5, "added to the variance inside the norms"),
    ("model.tie_embeddings", True, "the head is the embedding, transposed"),
    ("model.initializer_range", 0.02, "standard deviation of the initial weights"),
    ("model.max_positions", 0, "learned positions; 0 = none"),
    ("model.embed_dropout", 0.1, "dropout after the embedding"),
    ("model.resid_dropout", 0.0, "dropout on the output of each mixer"),
    ("model.dtype", "float32", "compute dtype: float32 or bfloat16 (parameters stay float32)"),
    ("model.remat", False, "recompute each block in the backward pass: less memory, more time"),
    ("data.mode", "device", "device: generated inside the step; zoology: the original's numpy process, number for number"),
    ("data.train", ({"length": 64, "num_kv_pairs": 4, "num_examples": 100_000},), "training segments, in this order; num_examples=None is endless"),
    ("data.test", ({"length": 64, "num_kv_pairs": 4, "num_examples": 3000},), "test segments, each reported"),
    ("data.power_a", 0.01, "exponent of the power law of the gap between a pair and its query"),
    ("data.random_non_queries", True, "fill the positions that hold nothing with random tokens rather than 0"),
    ("data.num_passes", 1, "how often the context is repeated before the queries"),
    ("data.test_batch_size", 256, "sequences per evaluation step"),
    ("data.seed", None, "seed of the data; None = the run's seed, or in zoology mode 123, the original's"),
    ("data.cache_dir", "", "where zoology mode keeps its draws and text its tokens; empty = the user's cache directory"),
    ("data.path", "", "text: a file, a folder, a glob, several with commas between, or tfds:NAME; empty = the help topics of Python"),
    ("data.validation_path", "", "text to evaluate on; empty = the last data.held_out of the training text"),
    ("data.held_out", 0.05, "the share of the tokens that is kept for evaluation where there is no validation_path"),
    ("data.tokenizer", "bytes", "bytes, bpe (trained on the text, model.vocab_size tokens), a tokenizer.json, or a folder of GPT-2's files"),
    ("data.length", 256, "text: tokens of a row; documents are packed into rows"),
    ("data.text_field", "text", "the field of a .jsonl line, the column of a .parquet file or the feature of a tfds set that holds the text"),
    ("data.separator", "<|endoftext|>", "the line that stands between the documents of a .txt file; empty = a file is one document"),
    ("data.errors", "strict", "bytes that are not UTF-8: strict (stop and name the place) or replace"),
    ("data.max_bad_lines", 10, "unreadable .jsonl lines that are passed over (and counted) before the run stops"),
    ("data.sample_prompt", "", "text: what the sample at the end of the run begins with"),
    ("optimizer.name", "adamw", "adamw, sgd, lion or muon"),
    ("optimizer.schedule", "cosine", "cosine, wsd (warmup-stable-decay), cosine_per_epoch or constant"),
    ("optimizer.warmup_steps", 0, "linear warm-up from 0"),
    ("optimizer.decay_steps", 0, "wsd: length of the final decay; 0 = a tenth of the steps"),
    ("optimizer.final_fraction", 0.0, "learning rate at the end, as a fraction of the peak"),
    ("optimizer.steps_per_epoch", 0, "cosine_per_epoch: steps between two changes; 0 = one pass over data.train"),
    ("optimizer.weight_decay", 0.1, "decoupled weight decay"),
    ("optimizer.decay_mask", "all", "which parameters decay: all (as the papers' MQAR) or matrices"),
    ("optimizer.clip_norm", 0.0, "clip the gradient to this global norm; 0 = never"),
    ("optimizer.b1", 0.9, "first moment decay (adamw, lion, muon's adamw part)"),
    ("optimizer.b2", 0.999, "second moment decay"),
    ("optimizer.eps", 1e-8, "adamw epsilon"),
    ("optimizer.momentum", 0.9, "sgd and muon momentum"),
    ("optimizer.accumulate", 1, "split each batch in this many parts and add their gradients"),
    ("mesh.data", -1, "devices along data; -1 = all that the other axes leave"),
    ("mesh.fsdp", 1, "devices along fsdp (parameters sharded, batch too)"),
    ("mesh.tensor", 1, "devices along tensor"),
    ("mesh.sequence", 1, "devices along sequence"),
    ("checkpoint.enabled", True, "write checkpoints"),
    ("checkpoint.every_seconds", 8.0, "at most this long between checkpoints; 0 = by steps only"),
    ("checkpoint.every_steps", 0, "at most this many steps between checkpoints; 0 = by time only"),
    ("checkpoint.keep_latest", 2, "newest checkpoints kept"),
    ("checkpoint.keep_best", 1, "best checkpoints kept, by the task's metric"),
    ("log.every_steps", 50, "steps between two lines of metrics.jsonl"),
    ("log.tensorboard", True, "write TensorBoard events to WORKDIR/tensorboard"),
    ("log.wandb", False, "also log to Weights & Biases (pip install wandb)"),
    ("log.progress", True, "progress bar on a terminal, plain lines elsewhere"),
    ("eval.every_steps", 200, "steps between two evaluations; the last step is always evaluated"),
    ("eval.stop_metric", "", "stop when this metric reaches stop_value, e.g. eval/accuracy"),
    ("eval.stop_value", 0.0, "see stop_metric"),
    ("runs", (), "a suite: ({'name': ..., 'model.d_model': ..., any other key}, ...), trained one after the other"),
    ("sweep", (), "({'learning_rate': [...], 'seed': [...], 'model.d_model': [...]}, ...): the product of each dict's lists; learning rates and seeds train in one program"),
    ("plot", "", "a suite's figure: recall_memory"),
)
# fmt: on

# A directory may be continued with other values of these keys: they change where and how a run happens, not its numbers.
FREE_KEYS = (
    "mesh",
    "checkpoint",
    "log",
    "eval",
    "steps_per_call",
    "max_bad_steps",
    "compilation_cache",
    "data.cache_dir",
)


def base_config() -> Config:
    """A locked ConfigDict with every key of KEYS at its default."""
    nested: dict[str, Any] = {}
    for path, default, _ in KEYS:
        *parents, leaf = path.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = deep_copy(default)
    return ConfigDict(nested).lock()


def from_plain(plain: Mapping[str, Any]) -> Config:
    """The config again, starting from the defaults so that a directory written before a key existed can still be read.

    Raises:
      UserError: a key this version does not know, or a value of another type.
    """
    config = base_config()
    for path, value in _leaves(plain):
        set_key(config, path, value)
    return config


def dumps(config: Config) -> str:
    """The text of config.json: the same config gives the same bytes."""
    return json.dumps(to_plain(config), indent=1, sort_keys=True) + "\n"


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """`key: saved value -> new value` for every key that must not change in a directory but did (see FREE_KEYS)."""
    old, new = (dict(_leaves(to_plain(c))) for c in (saved, config))
    # a key that did not exist when the directory was written had its default
    old = {path: to_plain(default) for path, default, _ in KEYS} | old
    return [
        f"config.{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in {**new, **old}
        if not _is_free(key) and _canonical(old.get(key)) != _canonical(new.get(key))
    ]


def expand_runs(config: Config) -> list[tuple[str, Config]]:
    """The runs of a suite as (name, full config); the overrides of each run are set on the suite's own keys.

    Raises:
      UserError: a run without a name, two of one name, an unknown key.
    """
    runs: list[tuple[str, Config]] = []
    for i, overrides in enumerate(config.runs):
        name = overrides.get("name") if isinstance(overrides, Mapping) else None
        if not isinstance(name, str) or not re.fullmatch(r"[\w.=-]+", name) or name.startswith("."):
            raise UserError(
                f"config.runs[{i}] needs a 'name' of letters, digits, '_', '-', '=' and '.', got {name!r}"
            )
        if name in (other for other, _ in runs):
            raise UserError(
                f"config.runs has two runs named {name!r}; each needs its own directory"
            )
        run = from_plain({**to_plain(config), "runs": [], "sweep": [], "plot": ""})
        for path, value in overrides.items():
            if path != "name":
                set_key(run, path, value, where=f"run {name!r}: ")
        runs.append((name, run))
    return runs


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every key; lists are leaves."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_free(path: str) -> bool:
    return any(path == key or path.startswith(f"{key}.") for key in FREE_KEYS)


def _canonical(value: Any) -> str:
    return json.dumps(to_plain(value), sort_keys=True)
