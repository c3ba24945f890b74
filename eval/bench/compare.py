"""Training steps of both sides in turns, one case (mixer, length, batch) after the other."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from eval.bench.timing import summarise
from eval.bench.train_step import FIELDS, Case
from eval.bench.worker import KEEP_FREED_MEMORY, Worker
from train.errors import UserError

PEER = Path(__file__).with_name("zoology_peer.py")
PEER_STEPS, SINGLE_CALLS, SEVERAL_CALLS = 2, 8, 3  # in one turn


class Peer(NamedTuple):
    """The original, and the interpreter that runs it."""

    python: Path
    zoology: Path

    def command(self, case: Case) -> list[str | Path]:
        where = ["--zoology", self.zoology, "--mixer", case.mixer]
        size = ["--length", case.length, "--batch", case.batch, "--labels", case.labels]
        return [self.python, "-P", PEER, *where, *map(str, size), "--serve"]


def parse_cases(args: argparse.Namespace) -> list[Case]:
    """The cases of --mixers and --shapes.

    Raises:
      UserError: a mixer that cannot be compared, a shape that is not LENGTHxBATCH.
    """
    cases = []
    for shape in args.shapes:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if not match:
            raise UserError(
                f"--shapes {shape} is not LENGTHxBATCH; e.g. 64x256 for 256 rows of 64 tokens"
            )
        length, batch = int(match[1]), int(match[2])
        if length < 16 or length % 2:
            raise UserError(f"--shapes {shape}: an MQAR row of 4 pairs needs an even length >= 16")
        cases += [(mixer, length, batch) for mixer in args.mixers]
    unknown = [mixer for mixer in args.mixers if mixer not in FIELDS]
    if unknown:
        raise UserError(
            f"--mixers {unknown[0]} has no peer to compare with; use {', '.join(FIELDS)}"
        )
    return [Case(*case) for case in cases]


def parse_peer(args: argparse.Namespace) -> Peer | None:
    """The peer, if the command line names one.

    Raises:
      UserError: half of it, or paths that are not what they should be.
    """
    python, zoology = args.peer_python, args.zoology
    if python is None and zoology is None:
        return None
    if python is None or zoology is None:
        raise UserError(
            "--peer_python and --zoology go together: who runs the peer, and where it is"
        )
    if not python.is_file():
        raise UserError(f"--peer_python {python} is not a file; give the path of an interpreter")
    if not (zoology / "zoology" / "model.py").is_file():
        raise UserError(f"--zoology {zoology} is not a checkout of HazyResearch/zoology")
    return Peer(python, zoology)


def allocators(choice: str) -> list[tuple[str, Mapping[str, str]]]:
    """(name, environment) of each way to run both sides."""
    known = {"default": {}, "kept": KEEP_FREED_MEMORY}
    return [(name, known[name]) for name in (known if choice == "both" else [choice])]


def our_command(case: Case) -> list[str]:
    fields = [f"--{name}={value}" for name, value in case._asdict().items()]
    return [sys.executable, "-m", "eval.bench.train_step", *fields]


def compare(
    case: Case,
    peer: Peer | None,
    rounds: int,
    steps_per_call: int,
    environment: Mapping[str, str],
    breakdown: bool,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """One row: spreads of ours in calls of 1 and of `steps_per_call` steps, of the peer's, and the ratios of medians."""
    with ExitStack() as stack:
        tick(f"{case.mixer} {case.shape}: compiling")
        ours = stack.enter_context(Worker("jaxmodels", our_command(case), environment))
        theirs = None
        if peer:
            tick(f"{case.mixer} {case.shape}: warming up the peer")
            theirs = stack.enter_context(Worker("zoology", peer.command(case), environment))
        taken: dict[str, list[dict]] = {"single": [], "several": [], "peer": []}
        for turn in range(rounds):
            tick(f"{case.mixer} {case.shape}: round {turn + 1} of {rounds}")
            taken["single"].append(ours.ask(calls=SINGLE_CALLS, steps=1))
            taken["several"].append(ours.ask(calls=SEVERAL_CALLS, steps=steps_per_call))
            if theirs:
                taken["peer"].append(theirs.ask(steps=PEER_STEPS))
        row = {
            **case._asdict(),
            "steps_per_call": steps_per_call,
            "ours": ours.ready,
            "peer": theirs.ready if theirs else None,
            "times": {side: pool(turns) for side, turns in taken.items() if turns},
        }
        if breakdown:
            tick(f"{case.mixer} {case.shape}: parts of our step")
            row["parts"] = ours.ask(parts=rounds + 2)
    return row | {"ratio": ratios(row["times"])}


def pool(turns: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """The spreads of one side over all its turns."""
    return summarise(
        *([x for turn in turns for x in turn[what]] for what in ("seconds", "processor"))
    )


def ratios(times: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The peer's medians over ours, wall and processor time; above 1 where we are faster. Empty without a peer."""
    if "peer" not in times:
        return {}
    median = lambda side, what: times[side][what]["median"]
    return {
        side: {what: median("peer", what) / median(side, what) for what in ("seconds", "processor")}
        for side in ("single", "several")
    }
