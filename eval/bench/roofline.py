"""What a kernel cannot be faster than: its operations over a chip's peak, its bytes over a chip's bandwidth.

Estimates from counting, not measurements: peak rates of the data sheets (dense bfloat16), every array read and written once.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from pallas_kernels.based.feature_map import expanded_width


class Chip(NamedTuple):
    """Dense bfloat16 operations per second, bytes per second of its memory."""

    flops: float
    bandwidth: float


CHIPS = {
    "H200": Chip(989e12, 4.8e12),
    "H100": Chip(989e12, 3.35e12),
    "TPU v5e": Chip(197e12, 0.819e12),
    "TPU v5p": Chip(459e12, 2.765e12),
    "TPU v6e": Chip(918e12, 1.64e12),
}


class Call(NamedTuple):
    """b rows of t tokens, h query heads on g key/value heads, widths f and v, bytes of an element, chunks of c tokens."""

    b: int
    t: int
    h: int
    g: int
    f: int
    v: int
    chunk: int = 64
    element: int = 2

    @property
    def name(self) -> str:
        return f"{self.b} x {self.t} tokens, {self.h} heads, f={self.f}, v={self.v}"


class Work(NamedTuple):
    """Operations (a multiply and an add are two) and bytes of memory traffic."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    def seconds(self, chip: Chip) -> float:
        """The larger of the time to compute and the time to move."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)

    def bound(self, chip: Chip) -> str:
        return "compute" if self.flops / chip.flops > self.bytes / chip.bandwidth else "memory"

    def and_then(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def based_forward(call: Call) -> Work:
    """Scores and their product with the values over half of each chunk's square, phi(q) S, and S += phi(k) v^T."""
    b, t, h, g, f, v, chunk, element = call
    e, v1 = expanded_width(f), v + 1
    flops = b * t * (h * (chunk * (f + v1) + 2 * e * v1) + g * 2 * e * v1)
    elements = h * (f + v) + g * (f + v)  # q and y, k and v
    return Work(flops, b * t * (element * elements + 4 * h) + 4 * b * g * e * v1)


def based_backward(call: Call) -> Work:
    """Five products of a chunk's square instead of two, five with the states, S once more; q, k, v, y, dy read, three written."""
    b, t, h, g, f, v, chunk, element = call
    e, v1 = expanded_width(f), v + 1
    square = chunk * (3 * f + 2 * v1)
    flops = b * t * (h * (square + 4 * e * v1) + g * 6 * e * v1)
    elements = h * (2 * f + 2 * v) + g * (2 * f + 2 * v)
    return Work(flops, b * t * (element * elements + 4 * h) + 2 * 4 * b * g * e * v1)


def based_decode(call: Call) -> Work:
    """One token: the state is read and written once."""
    b, _, h, g, f, v, _, element = call
    e, v1 = expanded_width(f), v + 1
    flops = b * (h * 2 * e * v1 + g * 2 * e * v1)
    return Work(flops, b * (2 * 4 * g * e * v1 + element * (h + g) * (f + v)))


def counts_of(call: Call) -> dict[str, Work]:
    """What there is to count: decoding for one token, forward and backward for more."""
    if call.t == 1:
        return {"decode": based_decode(call)}
    forward, backward = based_forward(call), based_backward(call)
    return {"forward": forward, "backward": backward}


def estimates(calls: Sequence[Call]) -> list[dict]:
    """A row per call, direction and chip."""
    rows = []
    for call in calls:
        for direction, work in counts_of(call).items():
            rows += [
                {
                    "call": call.name,
                    "direction": direction,
                    "chip": name,
                    "flops": work.flops,
                    "bytes": work.bytes,
                    "intensity": work.intensity,
                    "seconds": work.seconds(chip),
                    "bound": work.bound(chip),
                }
                for name, chip in CHIPS.items()
            ]
    return rows


def roofline_table(rows: Sequence[dict]) -> Table:
    """Microseconds at the roofline of each chip, one line per call and direction."""
    title = (
        "Rooflines of BASED, microseconds (estimates from counts; m: memory, c: compute decides)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("call")
    for column in ("direction", "GFLOP", "MB", "FLOP/B", *CHIPS):
        table.add_column(column, justify="right")
    seen = dict.fromkeys((row["call"], row["direction"]) for row in rows)
    for call, direction in seen:
        mine = [row for row in rows if (row["call"], row["direction"]) == (call, direction)]
        first = mine[0]
        cells = [f"{first['flops'] / 1e9:.3g}", f"{first['bytes'] / 1e6:.3g}"]
        cells += [f"{first['intensity']:.0f}"]
        cells += [f"{row['seconds'] * 1e6:.3g} {row['bound'][0]}" for row in mine]
        table.add_row(call, direction, *cells)
    return table


# The call that the issue of the kernels names, a released model's heads, and decoding a batch.
CALLS = (
    Call(1, 32768, 16, 16, 16, 64),
    Call(4, 4096, 16, 16, 16, 112),
    Call(128, 1, 16, 16, 16, 64),
)
