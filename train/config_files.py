"""Finding and loading the file that `--config mqar/based` or, with a variant, `--config mqar/based_fig2:reduced` means."""

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import train
from train.config_paths import Config, nearest
from train.errors import UserError


def roots() -> list[Path]:
    """Where named configs live: train/_configs in an installed wheel, configs/ beside the package in a checkout."""
    package = Path(train.__file__).resolve().parent
    return [root for root in (package / "_configs", package.parent / "configs") if root.is_dir()][
        :1
    ]


def available() -> list[str]:
    """The names that --config takes, sorted: mqar/attention, mqar/based, ..."""
    names = {
        path.relative_to(root).with_suffix("").as_posix()
        for root in roots()
        for path in root.rglob("*.py")
        if not any(part.startswith(("_", ".")) for part in path.relative_to(root).parts)
    }
    return sorted(names)


def variants(name: str) -> list[str]:
    """What may follow `name:` - the words of VARIANTS, a dict or a tuple of strings in the file; [] where it has none.

    Reads the file without running it, so that a help text can list the variants of all configs.
    """
    try:
        tree = ast.parse(find_config(name).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return []
    for node in (n for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if "VARIANTS" in (target.id for target in targets if isinstance(target, ast.Name)):
            words = getattr(node.value, "keys", None) or getattr(node.value, "elts", [])
            return [str(word.value) for word in words if isinstance(word, ast.Constant)]
    return []


def split_variant(name: str) -> tuple[str, str | None]:
    """`mqar/based_fig2:reduced` -> ("mqar/based_fig2", "reduced"); no variant: None. A file of the whole name wins."""
    head, colon, variant = name.rpartition(":")
    return (head, variant) if colon and head and not Path(name).is_file() else (name, None)


def find_config(name: str) -> Path:
    """The file of a config (its name without a variant): a path that exists wins, then a name of `available()`, with or without `.py`.

    Raises:
      UserError: there is no such file; names the nearest config, or lists them.
    """
    candidates = [Path(name), *(root / f"{name.removesuffix('.py')}.py" for root in roots())]
    for path in candidates:
        if path.is_file():
            return path
    near = nearest(name, available())
    hint = (
        f"did you mean {near}?"
        if near
        else f"known configs: {', '.join(available())}; or give a path"
    )
    raise UserError(f"no config {name!r}; {hint}")


def load_config(name: str) -> Config:
    """`get_config()` of the file, or `get_config("reduced")` for a name that ends in `:reduced`; locked.

    Raises:
      UserError: no such file or variant, or what stopped Python from reading it: file, line and reason. The cause is
        chained.
    """
    name, variant = split_variant(name)
    path = find_config(name)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config file is, and has a get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(
                f"{path} has no get_config(); it must return the config, starting from train.config.base_config()"
            )
        config = _call(module.get_config, variant, name, path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}{_line_of(error, path)}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() returned {type(config).__name__}, not a ConfigDict from base_config()"
        )
    return config.lock()


def _call(get_config: Callable[..., Any], variant: str | None, name: str, path: Path) -> Any:
    """get_config() or get_config(variant), if it takes one and VARIANTS, where there is such a list, has that word."""
    parameters = list(inspect.signature(get_config).parameters.values())
    known = variants(str(path))
    if variant is None:
        if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
            example = known[0] if known else "VARIANT"
            raise UserError(f"{name} needs a variant, --config {name}:{example}")
        return get_config()
    if not parameters:
        raise UserError(f"{name} has no variants; write --config {name} without :{variant}")
    if known and variant not in known:
        raise UserError(f"{name} has no variant {variant!r}; its variants are {', '.join(known)}")
    return get_config(variant)


def _first_line(error: Exception) -> str:
    text = str(
        error.args[0] if error.args else error
    )  # ml_collections wraps a KeyError, whose str() is a repr
    return text.strip("\"'").splitlines()[0] if text else "no message"


def _line_of(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f":{line}" if line else ""
