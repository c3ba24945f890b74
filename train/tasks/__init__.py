"""The tasks that `python -m train` knows. A new one is a file here with `build(config) -> Task` and `check(config)`, and a
line each in TASKS and CHECKS."""

from collections.abc import Callable

from ml_collections import ConfigDict

from train.errors import UserError
from train.tasks import mqar, text
from train.tasks.task import Batch, Metrics, Program, Task

__all__ = ["CHECKS", "TASKS", "Batch", "Metrics", "Program", "Task", "build_task"]

TASKS: dict[str, Callable[[ConfigDict], Task]] = {"mqar": mqar.build, "text": text.build}
# what can be said of a config in a moment, before anything is written or read whole
CHECKS: dict[str, Callable[[ConfigDict], None]] = {"mqar": mqar.check, "text": text.check}


def build_task(config: ConfigDict) -> Task:
    """The task that config.task names, built from the whole run config.

    Raises:
      UserError: an unknown task, or values the task cannot work with.
    """
    if config.task not in TASKS:
        raise UserError(f"config.task must be one of {', '.join(TASKS)}, got {config.task!r}")
    return TASKS[config.task](config)
