"""Seconds, and how far they can be trusted: warm-up, repeats, median and quartiles, the machine and its versions."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from train.session import versions


class Spread(NamedTuple):
    """Median, quartiles and minimum of `count` measurements, in seconds."""

    median: float
    lower: float
    upper: float
    least: float
    count: int


def spread(seconds: Sequence[float]) -> Spread:
    """Of a sample; quartiles interpolate linearly between order statistics.

    Raises:
      ValueError: no measurement at all.
    """
    if not len(seconds):
        raise ValueError("there is no measurement to summarise")
    lower, median, upper = (float(x) for x in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return Spread(median, lower, upper, float(np.min(seconds)), len(seconds))


def milliseconds(seconds: float) -> str:
    """Three significant digits, never an exponent: 0.0123 s is "12.3"."""
    value = 1e3 * seconds
    digits = max(0, 2 - int(np.floor(np.log10(value)))) if value > 0 else 0
    return f"{value:.{min(digits, 4)}f}"


def seconds_of(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall time of one call until its result is there, and the time of all processors together.

    The second hardly depends on what else the machine does, but does not show how well the cores were used.
    """
    used, start = time.process_time(), time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start, time.process_time() - used


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    enough: float = 20.0,
    settle: float = 0.3,
) -> dict[str, dict[str, Any]]:
    """name -> {"seconds": spread, "processor": spread} of every call.

    They are measured in turns, so that a machine that slows down slows all of them. A turn begins with `settle` seconds of
    uncounted calls: a small call right after one that touched gigabytes pays for cold caches and a heap that was given back
    (BASED's chunked form at 4,096 takes 54 instead of 29 ms after its quadratic form). A call that has used up `enough`
    seconds is measured no more than three times.
    """
    for call in calls.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            if turn < 3 or sum(seconds for seconds, _ in taken[name]) < enough:
                deadline = time.perf_counter() + settle
                while time.perf_counter() < deadline:
                    jax.block_until_ready(call())
                taken[name].append(seconds_of(call))
    return {name: summarise(*zip(*pairs)) for name, pairs in taken.items()}


def summarise(seconds: Sequence[float], processor: Sequence[float]) -> dict[str, Any]:
    """What is kept of a sample: plain numbers, for JSON."""
    return {"seconds": spread(seconds)._asdict(), "processor": spread(processor)._asdict()}


def machine() -> dict[str, Any]:
    """What a number may depend on; how busy the machine is already included."""
    return {
        **versions(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
