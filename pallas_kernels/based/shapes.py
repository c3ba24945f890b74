"""Named argument sets, run by the tests and by `python -m eval bench --op based`."""

from typing import NamedTuple


class Shape(NamedTuple):
    """b sequences of t tokens, h query heads on g key/value heads, widths f and v."""

    b: int
    t: int
    h: int
    g: int
    f: int
    v: int


TEST_SHAPES = {
    "one_token": Shape(2, 1, 2, 2, 4, 3),
    "odd": Shape(1, 37, 3, 3, 5, 7),
    "grouped": Shape(2, 21, 4, 2, 8, 16),
    "paper": Shape(1, 33, 2, 2, 16, 64),
    "released_1b": Shape(1, 19, 2, 2, 16, 112),
    "narrow": Shape(2, 17, 1, 1, 1, 1),
    "wide_f": Shape(1, 18, 1, 1, 24, 16),
}

BENCH_SHAPES = {f"t{t}": Shape(1, t, 4, 4, 16, 64) for t in (512, 1024, 2048, 4096, 8192, 16384)}
