"""Every implementation of an op against length: time forward, with backward and per decoded token, memory, roofline.

Each form is a process of its own (op_worker.py; based_peer.py for PyTorch), and they take turns.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from eval.bench.op_forms import DIRECTIONS, OPS, Op, Size
from eval.bench.roofline import CHIPS, Chip
from eval.bench.timing import summarise
from eval.bench.worker import Worker

BASED_PEER = Path(__file__).with_name("based_peer.py")
PEERS = {"torch": "chunks", "fla_chunk": "fused_chunk_based", "fla_parallel": "parallel_based"}
ENOUGH = 5.0  # seconds after which a form is measured no more than three times
DEVICES = {  # what jax calls a chip of roofline.CHIPS
    "NVIDIA H200": "H200",
    "NVIDIA H100": "H100",
    "TPU v5 lite": "TPU v5e",
    "TPU v5": "TPU v5p",
    "TPU v6 lite": "TPU v6e",
}


def measure_op(
    name: str,
    lengths: Sequence[int],
    repeats: int,
    memory_gib: float,
    size: Size,
    tick: Callable[[str], None] = lambda what: None,
    peer_python: Path | None = None,
) -> dict[str, Any]:
    """{"op", "what", "rows": one per length, direction and form}; a row that did not fit has no "seconds".

    size: all but the length. peer_python: runs BASED in PyTorch, and flash-linear-attention's where that is installed.
    "absent" says of a peer why it is not among the rows.
    """
    op = OPS[name]
    fixed = [f"--{field}={value}" for field, value in size._asdict().items() if field != "length"]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        sides: dict[str, Worker] = {}
        for form in op.forms(size):
            tick(f"{name}: starting {form}")
            command = [sys.executable, "-m", "eval.bench.op_worker", f"--op={name}"]
            command += [f"--form={form}", f"--memory={memory_gib}", *fixed]
            command += [] if sides else ["--peak"]
            sides[form] = stack.enter_context(Worker(form, command))
        ours = next(iter(sides.values())).ready
        absent = {}
        for form, what in PEERS.items() if name == "based" and peer_python else ():
            tick(f"{name}: starting {form}")
            command = [peer_python, "-P", BASED_PEER, f"--form={what}", *fixed]
            worker = stack.enter_context(Worker(form, command))
            if "absent" in worker.ready:
                absent[form] = worker.ready["absent"]
            else:
                sides[form] = worker
        chip, source = _chip(ours)
        for length in lengths:
            for direction in DIRECTIONS:
                tick(f"{name} {length} {direction}")
                request = {"length": length, "direction": direction}
                roof = _roof(op, size._replace(length=length), direction, chip)
                for form, answer in take_turns(sides, request, repeats).items():
                    rows.append({**request, "form": form, **answer} | _fraction(roof, answer))
    return {
        "op": name,
        "what": op.what(size),
        "dtype": size.dtype,
        "repeats": repeats,
        "roofline": {**chip._asdict(), "source": source},
        "peers": {form: side.ready for form, side in sides.items() if form in PEERS},
        "absent": absent,
        "rows": rows,
    }


def take_turns(
    sides: Mapping[str, Worker], request: Mapping[str, Any], repeats: int
) -> dict[str, dict[str, Any]]:
    """form -> {"temporary", "seconds": spread, "processor": spread}, one measurement of each form a turn."""
    taken: dict[str, list[dict[str, Any]]] = {form: [] for form in sides}
    for turn in range(repeats):
        for form, side in sides.items():
            before = taken[form]
            if before and "seconds" not in before[0]:
                continue  # too large, or no such direction
            if turn < 3 or sum(answer["seconds"][0] for answer in before) < ENOUGH:
                before.append(side.ask(calls=1, **request))
    result = {}
    for form, answers in taken.items():
        if not answers[0]:
            continue
        result[form] = {"temporary": answers[0].get("temporary", 0)}
        if "seconds" in answers[0]:
            columns = ([a[what][0] for a in answers] for what in ("seconds", "processor"))
            result[form] |= summarise(*columns)
    return result


def _chip(ready: Mapping[str, Any]) -> tuple[Chip, str]:
    """The peaks to compare with: of the data sheet, or measured where there is none (a CPU)."""
    name = DEVICES.get(ready["device"])
    if name:
        return CHIPS[name], f"data sheet of {name}, dense bfloat16"
    return Chip(**ready["peak"]), "the best product and copy measured here"


def _roof(op: Op, size: Size, direction: str, chip: Chip) -> float | None:
    work = op.work(size, direction)
    return work.seconds(chip) if work else None


def _fraction(roof: float | None, answer: Mapping[str, Any]) -> dict[str, float]:
    """The roofline's seconds, and their share of the measured ones, where both exist."""
    if roof is None or "seconds" not in answer:
        return {}
    return {"roofline": roof, "fraction": roof / answer["seconds"]["median"]}
