"""Two sides that take turns: a process each, asked over its standard input, answering a line of JSON.

A process prints one JSON object when it is warm. From then on every line it reads is a request (a JSON object) and every
line it prints the answer. It sleeps in between, so that only one side computes at a time.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.errors import UserError

# Freed memory is otherwise handed back at once and faulted in again by the next step, a page at a time.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}


class Worker:
    """A side of a comparison. `ready` is what it said of itself."""

    def __init__(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        try:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **(environment or {})},
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise UserError(f"{name}: {command[0]} does not start ({error.strerror})") from error
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
          UserError: the process ended instead; the line holds the last one that it wrote to stderr.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone; _answer finds out why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # the rest is what imports like to print
                return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        last = [text for text in self._errors.read().splitlines() if text.strip()][-1:]
        raise UserError(f"{self.name} ended with code {code}: {(last or ['no message'])[0]}")

    def close(self) -> None:
        """Ends the process: its input ends, and it is stopped if that is not enough."""
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        finally:
            self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(ready: Mapping[str, Any], answer: Callable[..., Mapping[str, Any]]) -> None:
    """The other end: says `ready`, then answers requests until its input ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever else prints must not look like an answer
    print(json.dumps(ready), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=out, flush=True)
