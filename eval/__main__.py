"""The command line of evaluation: `python -m eval TASK ...`.

A task is a module (or package) in this folder with `add_arguments(parser)` and `run(args) -> int | None`; its name is the
subcommand and the first line of its docstring the help. There is no list to keep.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import eval as package
from train.cli import report_errors
from train.config_paths import nearest
from train.errors import UserError


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line (default: sys.argv[1:]); 0, or 2 for input that cannot work, 130 for Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    return report_errors(lambda: _main(args), debug="--debug" in args)


def _main(args: list[str]) -> int:
    if not args:
        raise UserError(f"a task is missing: {', '.join(tasks())}; see --help")
    if args[0] in ("-h", "--help"):
        make_parser(tasks()).parse_args(args)
    if args[0].startswith("-"):
        raise UserError(f"name the task before its options: {', '.join(tasks())}")
    if args[0] not in module_names() or not is_task(args[0]):
        near = nearest(args[0], tasks())
        hint = f"did you mean {near}?" if near else f"tasks: {', '.join(tasks())}"
        raise UserError(f"no task {args[0]!r}; {hint}")
    options = make_parser([args[0]]).parse_args(args)  # the other tasks need not be imported
    return options.run(options) or 0


def module_names() -> list[str]:
    """Modules of this folder that could be tasks, sorted."""
    return sorted(
        m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")
    )


def is_task(name: str) -> bool:
    """Whether a module has what a task must have."""
    return all(hasattr(load(name), attribute) for attribute in ("add_arguments", "run"))


def tasks() -> list[str]:
    """The names of the tasks there are, sorted."""
    return [name for name in module_names() if is_task(name)]


def load(name: str) -> ModuleType:
    """The module of a task."""
    return importlib.import_module(f"{package.__name__}.{name}")


class Parser(argparse.ArgumentParser):
    """argparse, with errors as UserError: one line instead of the usage and an exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def make_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the given tasks as subcommands."""
    parser = Parser(
        prog="python -m eval", description="Evaluate, measure and plot what was trained."
    )
    commands = parser.add_subparsers(title="tasks", metavar="TASK", required=True)
    for name in names:
        module = load(name)
        doc = (module.__doc__ or name).strip()
        summary = doc.splitlines()[0]
        command = commands.add_parser(
            name,
            help=summary.rstrip("."),
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
