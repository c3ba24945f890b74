"""Named argument sets, run by the tests and by the benchmarks: the shapes of attention with a window."""

from typing import NamedTuple

from pallas_kernels.attention import shapes as whole
from pallas_kernels.attention.shapes import Shape


class Windowed(NamedTuple):
    """Arguments of the op, and the keys that a query sees."""

    shape: Shape
    window: int


TEST_SHAPES = {
    "odd": Windowed(whole.TEST_SHAPES["odd"], 5),
    "itself": Windowed(whole.TEST_SHAPES["odd"], 1),
    "grouped": Windowed(whole.TEST_SHAPES["grouped"], 9),
    "history": Windowed(whole.TEST_SHAPES["history"], 6),
    "short_history": Windowed(Shape(1, 19, 22, 2, 2, 4, 4), 6),
    "all": Windowed(whole.TEST_SHAPES["odd"], 100),
    "decoding": Windowed(whole.TEST_SHAPES["decoding"], 4),
}

BENCH_SHAPES = {
    "mqar_64": Windowed(whole.BENCH_SHAPES["mqar_64"], 16),
    "mqar_256": Windowed(whole.BENCH_SHAPES["mqar_256"], 16),
    **{f"t{t}": Windowed(whole.BENCH_SHAPES[f"t{t}"], 128) for t in (1024, 4096, 16384)},
}
