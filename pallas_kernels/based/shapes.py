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


class Core(NamedTuple):
    """A call that every kernel must take and every compiler must compile."""

    shape: Shape
    dtype: str
    segments: bool = False
    state: bool = False


CORE = {
    "paper": Core(Shape(1, 2048, 16, 16, 16, 64), "bfloat16"),
    "released_1b": Core(Shape(1, 2048, 16, 16, 16, 112), "bfloat16"),
    "paper_float32": Core(Shape(1, 1024, 16, 16, 16, 64), "float32"),
    "f24": Core(Shape(1, 1024, 8, 8, 24, 80), "bfloat16"),
    "wide": Core(Shape(1, 1024, 8, 8, 32, 128), "bfloat16"),
    "grouped": Core(Shape(2, 1024, 8, 2, 16, 64), "bfloat16", state=True),
    "packed": Core(Shape(2, 1000, 8, 8, 16, 64), "bfloat16", segments=True, state=True),
    "decode": Core(Shape(8, 1, 16, 16, 16, 64), "bfloat16", state=True),
}
