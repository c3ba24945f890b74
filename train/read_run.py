"""Reading back what a run left: its config and its model, for evaluation."""

from pathlib import Path

from train.config import from_plain
from train.config_paths import Config
from train.errors import UserError
from train.points import read_json


def read_config(workdir: str | Path) -> Config:
    """The config a directory was trained with.

    Raises:
      UserError: there is no such directory, no run in it, or a config.json that cannot be read. For the directory of a
        suite the runs in it are named.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"no directory {workdir}; give the --workdir of a training run")
    plain = read_json(workdir / "config.json")
    if plain is None:
        runs = sorted(path.parent.name for path in workdir.glob("*/config.json"))
        hint = (
            f"take one of its runs: {', '.join(f'{workdir}/{run}' for run in runs)}"
            if runs
            else ("give the --workdir of a training run")
        )
        raise UserError(f"{workdir} holds no config.json; {hint}")
    try:
        return from_plain(plain)
    except (UserError, AttributeError, TypeError) as error:
        raise UserError(f"{workdir / 'config.json'}: {error}") from error
