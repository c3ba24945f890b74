"""Finding and loading the file that `--config mqar/based` means."""

import importlib.util
from pathlib import Path

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


def find_config(name: str) -> Path:
    """The file of a config: a path that exists wins, then a name of `available()`, with or without `.py`.

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
    """`get_config()` of the file, locked.

    Raises:
      UserError: no such file, or what stopped Python from reading it: file, line and reason. The cause is chained.
    """
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
        config = module.get_config()
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
