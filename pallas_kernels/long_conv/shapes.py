"""Named argument sets, run by the tests and by the benchmarks of the long convolution."""

from typing import NamedTuple


class Shape(NamedTuple):
    """b sequences of t tokens, d channels, a filter of m lags; packed rows say how often a segment ends."""

    b: int
    t: int
    d: int
    m: int
    segment_ends: float | None = None  # chance that a token is its segment's last; None: no ids


TEST_SHAPES = {
    "one_token": Shape(3, 1, 4, 5),
    "odd": Shape(2, 37, 3, 37),
    "short_filter": Shape(2, 45, 3, 7),
    "one_lag": Shape(2, 9, 3, 1),
    "long_filter": Shape(2, 19, 3, 64),
    "past_direct": Shape(1, 131, 2, 131),
    "packed": Shape(3, 67, 3, 67, 0.06),
    "packed_short_filter": Shape(3, 67, 3, 20, 0.06),
    "packed_tiny": Shape(3, 37, 3, 37, 0.6),
}

BENCH_SHAPES = {
    f"t{t}": Shape(16384 // t, t, 64, t) for t in (64, 128, 256, 512, 1024, 4096, 16384)
} | {f"packed_t{t}": Shape(16384 // t, t, 64, t, 4 / t) for t in (64, 256, 1024)}
