"""The command line of training: `python -m train --config mqar/based --workdir runs/based`."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from train.config import KEYS
from train.config_files import available, load_config, variants
from train.config_paths import Config, get_key, set_key
from train.errors import UserError

USAGE = """\
Train a sequence model, or a suite of them.

usage: python -m train --config CONFIG --workdir DIR [--config.key.sub=value ...] [--debug]

  --config CONFIG     a name from the list below, or the path of a Python file with a get_config(); a colon and a
                      word choose a variant of it, as in mqar/based_fig2:reduced
  --workdir DIR       where everything the run produces goes; the same command on the same directory resumes
  --config.KEY=VALUE  override a key of the config, e.g. --config.model.mixers[0].feature_dim=24
  --debug             show the traceback of an error
  --help              this text

example:
  python -m train --config mqar/based --workdir runs/based --config.seed=1 --config.model.d_model=128
"""
_OVERRIDE = re.compile(r"-{1,2}(no)?config\.([^=]+)(=.*)?", re.DOTALL)


@dataclass(frozen=True)
class Options:
    """What a command line asks for."""

    config: Config
    workdir: Path


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line (default: sys.argv[1:]) and returns its exit code.

    0, or 1 where some runs of a suite failed, 2 for input that cannot work, 130 for Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args)
    return report_errors(lambda: _main(args), debug="--debug" in args or "-debug" in args)


def _main(args: list[str]) -> int:
    if any(arg in ("--help", "-help", "-h", "--helpfull", "--helpshort") for arg in args):
        print(help_text())
        return 0
    options = parse(args)

    from train.check import check
    from train.sharding import make_mesh

    check(options.config)
    if options.config.runs or options.config.sweep:
        from train.suite import run_suite

        return run_suite(options.config, options.workdir)

    make_mesh(
        options.config
    )  # before the directory is made, so that a wrong mesh leaves nothing behind

    from train.loop import run

    summary = run(options.config, options.workdir)

    from train.plots import learning_curves
    from train.points import one_line

    learning_curves(options.workdir)
    print(f"{options.workdir}: {one_line(summary)}")
    return 0


def parse(args: Sequence[str]) -> Options:
    """The config with its overrides, and the directory.

    Raises:
      UserError: anything on the line that is missing, unknown or of the wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_bool("debug", False, "", flag_values=values)
    name = _config_name(args)
    config = load_config(name)
    paths = _define_overrides(args, config, values)
    try:
        rest = values(["train", *args])[1:]
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}; see --help") from error
    if rest:
        raise UserError(
            f"unexpected {rest[0]!r}; options start with -- and values follow a =, see --help"
        )
    for path in paths:
        set_key(config, path, values[f"config.{path}"].value)
    if not values["workdir"].value:
        raise UserError(
            f"--workdir is missing; say where the run goes, e.g. --workdir runs/{Path(name.replace(':', '_')).stem}"
        )
    return Options(config, Path(values["workdir"].value))


def _config_name(args: Sequence[str]) -> str:
    """The value of --config, needed before the flags that depend on it can be defined."""
    for i, arg in enumerate(args):
        if arg.startswith(("--config=", "-config=")) and not arg.endswith("="):
            return arg.split("=", 1)[1]
        if arg in ("--config", "-config") and i + 1 < len(args) and not args[i + 1].startswith("-"):
            return args[i + 1]
    near = f"--config {available()[0]}" if available() else "--config PATH"
    raise UserError(f"--config is missing; e.g. {near}, and --help lists the configs")


def _define_overrides(args: Sequence[str], config: Config, values: flags.FlagValues) -> list[str]:
    """A flag for each --config.key, so that absl reads `--config.key value` and `--noconfig.switch` too.

    Returns the keys in order. Whether they exist is for `set_key` to say, when those before them are set.
    """
    paths: list[str] = []
    for arg in args:
        match = _OVERRIDE.fullmatch(arg)
        if not match or match[2] in paths:
            continue
        paths.append(match[2])
        is_switch = isinstance(_current(config, match[2]), bool)
        if match[1] and not is_switch:
            raise UserError(
                f"--noconfig.{match[2]}: --no works only for keys that are true or false"
            )
        define = flags.DEFINE_bool if is_switch else flags.DEFINE_string
        define(f"config.{match[2]}", None, "", flag_values=values)
    return paths


def _current(config: Config, path: str) -> object:
    try:
        return get_key(config, path)
    except UserError:
        return None


def report_errors(body: Callable[[], int], debug: bool) -> int:
    """Calls `body`; what the user can mend becomes one line on stderr and exit code 2.

    With `debug` the traceback comes before the line. Exceptions that are nobody's fault but ours pass through.
    """
    try:
        return body()
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not _is_users(error):
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


def _is_users(error: OSError) -> bool:
    """Disk full, no permission and the like, rather than a bug that shows as an OSError."""
    names = "ENOSPC EDQUOT EACCES EPERM EROFS ENOTDIR EISDIR ENOENT EEXIST EFBIG EIO"
    return errno.errorcode.get(error.errno or 0) in names.split()


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        return f"{os.strerror(error.errno)}{where}"
    return " ".join(str(error).split())


def help_text() -> str:
    """Usage, the configs there are, and every key with its default."""
    keys = "\n".join(
        f"  {path:<{max(len(p) for p, _, _ in KEYS)}}  {meaning}  [{_short(default)}]"
        for path, default, meaning in KEYS
    )
    configs = "\n".join(f"  {_with_variants(name)}" for name in available())
    return f"{USAGE}\nconfigs:\n{configs}\n\nkeys (--config.KEY=VALUE) and their defaults:\n{keys}"


def _with_variants(name: str) -> str:
    """mqar/based_fig2[:full|reduced]"""
    words = "|".join(variants(name))
    return f"{name}[:{words}]" if words else name


def _short(default: object) -> str:
    return '""' if default == "" else str(default)
