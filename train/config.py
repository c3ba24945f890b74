"""Run configs: every key with its default and meaning, overriding a key by its path, and the way to JSON and back.

A config file (configs/) is a Python file whose `get_config()` starts from `base_config()` and sets what its claim needs.
The same `set_key` applies `--config.model.d_model=128` from the command line and the runs of a suite, so that both know
the same paths (`model.mixers[0].feature_dim` included), the same type rules and the same suggestions.
"""

import ast
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from train.errors import UserError

# (path, default, meaning). 0 or "" switches off whatever a key limits, so that every default has its key's type.
KEYS: tuple[tuple[str, Any, str], ...] = (
    ("task", "mqar", "which task of train/tasks to train"),
    ("steps", 1000, "training steps (optimiser updates)"),
    ("seed", 0, "seed of initialisation, data and dropout"),
    ("batch_size", 256, "sequences per step, over all devices"),
    ("learning_rate", 1e-3, "peak learning rate"),
    ("steps_per_call", 8, "steps in one compiled program; changes speed, never results"),
    (
        "max_bad_steps",
        20,
        "consecutive steps with a non-finite gradient before the run ends with an error",
    ),
    ("model.vocab_size", 8192, "vocabulary, which is also the head's width"),
    ("model.d_model", 64, "model width"),
    ("model.num_layers", 2, "layers; layer i uses mixers[i mod len(mixers)]"),
    (
        "model.mixers",
        [{"name": "attention"}],
        "sequence mixers: {'name': ..., and the fields of that mixer}",
    ),
    (
        "model.channel",
        "identity",
        "channel mixer after each sequence mixer: identity, mlp or swiglu",
    ),
    ("model.channel_multiplier", 4.0, "hidden width of the channel mixer over d_model"),
    ("model.norm", "layernorm", "layernorm or rmsnorm"),
    ("model.max_positions", 0, "learned positions; 0 = none"),
    ("model.embed_dropout", 0.1, "dropout after the embedding"),
    ("model.resid_dropout", 0.0, "dropout on the output of each mixer"),
    ("model.dtype", "float32", "compute dtype: float32 or bfloat16 (parameters stay float32)"),
    ("model.remat", False, "recompute each block in the backward pass: less memory, more time"),
    (
        "data.mode",
        "device",
        "device: generated inside the step; zoology: the original's numpy process, number for number",
    ),
    (
        "data.train",
        ({"length": 64, "num_kv_pairs": 4, "num_examples": 100_000},),
        "training segments, visited in this order; num_examples=None is endless",
    ),
    (
        "data.test",
        ({"length": 64, "num_kv_pairs": 4, "num_examples": 3000},),
        "test segments, each reported",
    ),
    ("data.power_a", 0.01, "exponent of the power law of the gap between a pair and its query"),
    (
        "data.random_non_queries",
        True,
        "fill the positions that hold nothing with random tokens rather than 0",
    ),
    ("data.num_passes", 1, "how often the context is repeated before the queries"),
    ("data.test_batch_size", 256, "sequences per evaluation step"),
    ("optimizer.name", "adamw", "adamw, sgd, lion or muon"),
    (
        "optimizer.schedule",
        "cosine",
        "cosine, wsd (warmup-stable-decay), cosine_per_epoch or constant",
    ),
    ("optimizer.warmup_steps", 0, "linear warm-up from 0"),
    ("optimizer.decay_steps", 0, "wsd: length of the final decay; 0 = a tenth of the steps"),
    ("optimizer.final_fraction", 0.0, "learning rate at the end, as a fraction of the peak"),
    (
        "optimizer.steps_per_epoch",
        0,
        "cosine_per_epoch: steps between two changes; 0 = one pass over data.train",
    ),
    ("optimizer.weight_decay", 0.1, "decoupled weight decay"),
    (
        "optimizer.decay_mask",
        "all",
        "which parameters decay: all (as the papers' MQAR) or matrices",
    ),
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
    (
        "runs",
        (),
        "a suite: ({'name': ..., 'model.d_model': ..., any other key}, ...), trained one after the other",
    ),
    ("plot", "", "a suite's figure: recall_memory"),
)
MEANING = {path: meaning for path, _, meaning in KEYS}

# A directory may be continued with other values of these keys: they change where and how a run happens, not its numbers.
FREE_KEYS = ("mesh", "checkpoint", "log", "eval", "steps_per_call", "max_bad_steps")

_PART = re.compile(r"\.?([A-Za-z_][A-Za-z0-9_]*)|\[(-?\d+)\]")


def base_config() -> ConfigDict:
    """A locked ConfigDict with every key of KEYS at its default."""
    nested: dict[str, Any] = {}
    for path, default, _ in KEYS:
        *parents, leaf = path.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _copy(default)
    return ConfigDict(nested).lock()


def to_plain(value: Any) -> Any:
    """The config as what JSON holds: dicts, lists, strings, numbers, None. Keys keep their order; nothing is shared."""
    if isinstance(value, (ConfigDict, Mapping)):
        return {key: to_plain(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if hasattr(value, "item"):
        return value.item()
    return value


def from_plain(plain: Mapping[str, Any]) -> ConfigDict:
    """The config again, starting from the defaults so that a directory written before a key existed can still be read.

    Raises:
      UserError: a key this version does not know, or a value of another type.
    """
    config = base_config()
    for path, value in _leaves(plain):
        set_key(config, path, value)
    return config


def dumps(config: ConfigDict) -> str:
    """The text of config.json: the same config gives the same bytes."""
    return json.dumps(to_plain(config), indent=1, sort_keys=True) + "\n"


def differences(saved: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """`key: saved value -> new value` for every key that must not change in a directory but did (see FREE_KEYS)."""
    old, new = (dict(_leaves(to_plain(c))) for c in (saved, config))
    for (
        path,
        default,
        _,
    ) in KEYS:  # a key that did not exist when the directory was written had its default
        old.setdefault(path, to_plain(default))
    keys = [
        key
        for key in [*new, *(k for k in old if k not in new)]
        if key.split(".")[0] not in FREE_KEYS
    ]
    return [
        f"config.{k}: {old.get(k)!r} -> {new.get(k)!r}"
        for k in keys
        if _canonical(old.get(k)) != _canonical(new.get(k))
    ]


def expand_runs(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """The runs of a suite as (name, full config); the overrides of each run are set on the suite's own keys.

    Raises:
      UserError: a run without a name, two of one name, an unknown key.
    """
    runs: list[tuple[str, ConfigDict]] = []
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
        run = from_plain({**to_plain(config), "runs": [], "plot": ""})
        for path, value in overrides.items():
            if path != "name":
                set_key(run, path, value, where=f"run {name!r}: ")
        runs.append((name, run))
    return runs


def set_key(config: ConfigDict, path: str, value: Any, where: str = "") -> None:
    """Sets `model.mixers[0].feature_dim` or the like. A str value is read as the key's type, as from a command line.

    Keys of the config must exist; a dict inside a list (a mixer, a segment) also takes new keys, which `train.check`
    verifies against what they mean.

    Raises:
      UserError: unknown key (with the nearest), index out of range, value of another type.
    """
    *parents, last = parse_path(path)
    holder: Any = config
    for part in parents:
        holder = _child(config, holder, part, path, where)
    old = None if _is_new(holder, last) else _child(config, holder, last, path, where)
    new = _read(old, value, f"{where}config.{path}", is_new=_is_new(holder, last))
    if isinstance(holder, tuple):  # a tuple cannot be written into: write the whole of it again
        items = list(holder)
        items[last] = new
        set_key(config, path[: path.rindex("[")], tuple(items), where)
    else:
        holder[last] = new


def get_key(config: ConfigDict, path: str) -> Any:
    """The value at `path`; None for a key that a dict inside a list could take but does not have.

    Raises:
      UserError: as set_key.
    """
    *parents, last = parse_path(path)
    holder: Any = config
    for part in parents:
        holder = _child(config, holder, part, path, "")
    return None if _is_new(holder, last) else _child(config, holder, last, path, "")


def parse_path(path: str) -> list[str | int]:
    """`a.b[0].c` -> ["a", "b", 0, "c"]."""
    parts: list[str | int] = []
    at = 0
    while at < len(path):
        match = _PART.match(path, at)
        if not match or (at == 0 and match[0].startswith((".", "["))):
            raise UserError(
                f"cannot read the config key config.{path}; write it like config.model.mixers[0].name"
            )
        parts.append(match[1] if match[1] is not None else int(match[2]))
        at = match.end()
    if not parts:
        raise UserError("a config key is missing; write it like --config.model.d_model=64")
    return parts


def unknown_key(config: ConfigDict, path: str, where: str = "") -> UserError:
    """The error for a key that does not exist, with the nearest one that does."""
    near = nearest(path, list(_paths(config)))
    hint = f"did you mean config.{near}?" if near else "--help lists the keys"
    return UserError(f"{where}no config key config.{path}; {hint}")


def nearest(wanted: str, known: list[str]) -> str | None:
    """The known name closest to `wanted`, by the whole path or, a little worse, by its last part; None if none is close."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, wanted, candidate).ratio()
        last = difflib.SequenceMatcher(None, _last(wanted), _last(candidate)).ratio()
        return max(whole, 0.95 * last)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def _last(path: str) -> str:
    return re.split(r"[./]", path)[-1]


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    """Every path that can be set, inner nodes included."""
    if isinstance(node, (ConfigDict, Mapping)):
        children = [(f"{prefix}.{key}" if prefix else str(key), node[key]) for key in node]
    elif isinstance(node, (list, tuple)):
        children = [(f"{prefix}[{i}]", item) for i, item in enumerate(node)]
    else:
        return
    for path, child in children:
        yield path
        yield from _paths(child, path)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every key; lists are leaves."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_new(holder: Any, part: str | int) -> bool:
    """Whether `part` would be a new key of a dict inside a list."""
    return isinstance(holder, dict) and isinstance(part, str) and part not in holder


def _child(config: ConfigDict, holder: Any, part: str | int, path: str, where: str) -> Any:
    if isinstance(part, int):
        if not isinstance(holder, (list, tuple)):
            raise UserError(
                f"{where}config.{path}: [{part}] needs a list, and there is none at that place"
            )
        if not -len(holder) <= part < len(holder):
            raise UserError(
                f"{where}config.{path}: index {part} is past the end, the list has {len(holder)} items"
            )
        return holder[part]
    if not isinstance(holder, (ConfigDict, Mapping)) or part not in holder:
        raise unknown_key(config, path, where)
    return holder[part]


def _read(old: Any, value: Any, key: str, is_new: bool) -> Any:
    """`value` as the type of `old`; text is parsed, numbers are converted where nothing is lost."""
    if isinstance(old, ConfigDict):
        raise UserError(
            f"{key} is a group; set one of its keys: {', '.join(f'{key}.{k}' for k in old)}"
        )
    if old is None or is_new:
        return _literal(value) if isinstance(value, str) else _copy(value)
    if isinstance(old, str):
        if isinstance(value, str):
            return value
        raise _wrong(key, "a string", value)
    parsed = _literal(value) if isinstance(value, str) else value
    if isinstance(old, bool):
        parsed = {"true": True, "false": False, "1": True, "0": False}.get(
            str(parsed).lower(), parsed
        )
        if isinstance(parsed, bool):
            return parsed
        raise _wrong(key, "true or false", value)
    if isinstance(old, (int, float)):
        return _number(parsed, type(old), key, value)
    if isinstance(old, (list, tuple)):
        if isinstance(parsed, (list, tuple)):
            return type(old)(_copy(item) for item in parsed)
        raise _wrong(key, f"a list like {str(to_plain(old))!r}", value)
    if isinstance(old, Mapping):
        if isinstance(parsed, Mapping):
            return _copy(parsed)
        raise _wrong(key, f"a dict like {str(to_plain(old))!r}", value)
    return parsed


def _number(parsed: Any, kind: type, key: str, value: Any) -> int | float | None:
    """An int where an int is wanted (1e4 is one), a finite float where a float is; None where num_examples is endless."""
    if parsed is None and key.endswith(".num_examples"):
        return None
    is_number = (
        isinstance(parsed, (int, float)) and not isinstance(parsed, bool) and math.isfinite(parsed)
    )
    if kind is int and is_number and parsed == int(parsed):
        return int(parsed)
    if kind is float and is_number:
        return float(parsed)
    raise _wrong(key, "an integer" if kind is int else "a number", value)


def _wrong(key: str, wanted: str, value: Any) -> UserError:
    return UserError(f"{key} must be {wanted}, got {value!r}")


def _literal(text: str) -> Any:
    """The Python literal that the text is, or else the text itself."""
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _copy(value: Any) -> Any:
    """A deep copy that keeps tuples tuples: configs never share a list or a dict."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value


def _canonical(value: Any) -> str:
    return json.dumps(to_plain(value), sort_keys=True)
