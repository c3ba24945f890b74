"""What became of every point of a suite or a sweep: WORKDIR/ledger.json.

    {"points": {"based/lr=0.001,seed=0": {"status": "finished", "reason": "", "steps": 900, "metrics": {...}, "wall_seconds": 31.2}}}

The file is written whole at every change, so that it can be read at any time. It is a report: what is finished is decided by
the directories of the points, and a file that cannot be read is written anew.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.run_directory import write_atomically

STATUSES = ("waiting", "running", "finished", "failed", "stopped")
EMPTY: dict[str, Any] = {
    "status": "waiting",
    "reason": "",
    "steps": 0,
    "metrics": {},
    "wall_seconds": 0.0,
}


class Ledger:
    """The entries of `names`, in that order; those the file already has are kept."""

    def __init__(self, path: Path, names: Iterable[str]):
        self._path = path
        known = _read(path)
        self.points = {name: {**EMPTY, **known.get(name, {})} for name in names}

    def update(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Sets fields of entries, and writes the file if that changed anything."""
        before = json.dumps(self.points)
        for name, fields in changes.items():
            status = fields.get("status", "waiting")
            if status not in STATUSES:
                raise ValueError(f"{status!r} is not one of {', '.join(STATUSES)}")
            self.points[name] = {**self.points[name], **fields}
        if json.dumps(self.points) != before or not self._path.exists():
            write_atomically(self._path, json.dumps({"points": self.points}, indent=1) + "\n")

    def start(self, names: Iterable[str]) -> None:
        self.update({name: {"status": "running", "reason": ""} for name in names})

    def end(self, name: str, result: Mapping[str, Any]) -> None:
        """result: a summary, or {"reason": why there is none}."""
        self.update({name: outcome(result)})

    def with_status(self, *statuses: str) -> list[str]:
        return [name for name, entry in self.points.items() if entry["status"] in statuses]


def outcome(result: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a summary, or {"reason": ...}, sets."""
    if "reason" in result:
        return {"status": "failed", "reason": result["reason"]}
    return {
        "status": "finished",
        "reason": "",
        "steps": result["steps"],
        "metrics": dict(result["metrics"]),
        "wall_seconds": result["wall_seconds"],
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        points = json.loads(path.read_text(encoding="utf-8"))["points"]
        return {name: dict(entry) for name, entry in points.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{path} cannot be read ({error}); writing it anew", file=sys.stderr)
        return {}
