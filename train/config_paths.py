"""Reading and setting one key of a config by its path, `model.mixers[0].feature_dim` or the like.

One function, `set_key`, serves `--config.model.d_model=128` on the command line and the runs of a suite, so that both know
the same paths, the same type rules and the same suggestions.
"""

import ast
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from train.errors import UserError

# A ConfigDict. Annotated as Any because type checkers cannot know the attributes of one.
Config: TypeAlias = Any
_PART = re.compile(r"\.?([A-Za-z_][A-Za-z0-9_]*)|\[(-?\d+)\]")


def set_key(config: Config, path: str, value: Any, where: str = "") -> None:
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
        items[int(last)] = new
        set_key(config, path[: path.rindex("[")], tuple(items), where)
    else:
        holder[last] = new


def get_key(config: Config, path: str) -> Any:
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


def unknown_key(config: Config, path: str, where: str = "") -> UserError:
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


def _is_new(holder: Any, part: str | int) -> bool:
    """Whether `part` would be a new key of a dict inside a list."""
    return isinstance(holder, dict) and isinstance(part, str) and part not in holder


def _child(config: Config, holder: Any, part: str | int, path: str, where: str) -> Any:
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
        return _literal(value) if isinstance(value, str) else deep_copy(value)
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
            return type(old)(deep_copy(item) for item in parsed)
        raise _wrong(key, f"a list like {str(to_plain(old))!r}", value)
    if isinstance(old, Mapping):
        if isinstance(parsed, Mapping):
            return deep_copy(parsed)
        raise _wrong(key, f"a dict like {str(to_plain(old))!r}", value)
    return parsed


def _number(parsed: Any, kind: type, key: str, value: Any) -> int | float | None:
    """An int where an int is wanted (1e4 is one), a finite float where a float is; None where num_examples is endless."""
    if parsed is None and key.endswith(".num_examples"):
        return None
    if isinstance(parsed, (int, float)) and not isinstance(parsed, bool) and math.isfinite(parsed):
        if kind is float or parsed == int(parsed):
            return kind(parsed)
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


def deep_copy(value: Any) -> Any:
    """A deep copy that keeps tuples tuples: configs never share a list or a dict."""
    if isinstance(value, Mapping):
        return {key: deep_copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(deep_copy(item) for item in value)
    return value


def to_plain(value: Any) -> Any:
    """The config as what JSON holds: dicts, lists, strings, numbers, None. Keys keep their order; nothing is shared."""
    if isinstance(value, (ConfigDict, Mapping)):
        return {key: to_plain(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if hasattr(value, "item"):
        return value.item()
    return value
