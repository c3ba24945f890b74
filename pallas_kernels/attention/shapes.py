"""Named argument sets, run by the tests and by the benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """b sequences of t queries and s keys, h query heads on g key/value heads, widths k and v."""

    b: int
    t: int
    s: int
    h: int
    g: int
    k: int
    v: int


TEST_SHAPES = {
    "odd": Shape(2, 37, 37, 1, 1, 5, 7),
    "grouped": Shape(2, 21, 21, 4, 2, 8, 8),
    "history": Shape(1, 19, 43, 2, 2, 4, 4),
    "one_token": Shape(2, 1, 1, 2, 1, 3, 3),
    "decoding": Shape(2, 1, 23, 4, 2, 4, 5),
}

# The first two are the attention of the MQAR figures: 16,384 tokens, one head of width 64.
BENCH_SHAPES = {
    "mqar_64": Shape(256, 64, 64, 1, 1, 64, 64),
    "mqar_256": Shape(64, 256, 256, 1, 1, 64, 64),
    **{f"t{t}": Shape(1, t, t, 4, 4, 64, 64) for t in (512, 1024, 2048, 4096, 8192, 16384)},
    "decode": Shape(8, 1, 4096, 4, 4, 64, 64),
}
