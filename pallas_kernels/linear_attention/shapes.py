"""Named argument sets, run by the tests and by the benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """b rows of t tokens, h query heads on g key/value heads, widths k and v. decay: None, "head" or "channel"."""

    b: int
    t: int
    h: int
    g: int
    k: int
    v: int
    decay: str | None = None


TEST_SHAPES = {
    "plain": Shape(2, 37, 2, 2, 8, 5),
    "grouped": Shape(1, 23, 4, 2, 3, 4),
    "one_token": Shape(2, 1, 1, 1, 4, 4),
    "retnet": Shape(2, 37, 2, 2, 8, 5, "head"),
    "mamba2_grouped": Shape(1, 41, 4, 1, 6, 7, "head"),
    "gla": Shape(2, 53, 2, 2, 8, 5, "channel"),
    "gla_grouped": Shape(1, 33, 4, 2, 4, 3, "channel"),
}

BENCH_SHAPES = {
    f"{decay or 'plain'}_t{t}": Shape(1, t, 4, 4, 64, 64, decay)
    for decay in (None, "head", "channel")
    for t in (1024, 4096)
}
