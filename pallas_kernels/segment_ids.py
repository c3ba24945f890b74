"""What every op asks of segment ids: positive, never decreasing, then zeros (padding)."""

import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int


def check_segment_ids(segment_ids: Int[Array, "b t"]) -> None:
    """ValueError that names the row, for concrete ids that break this; traced ids cannot be looked at."""
    if isinstance(segment_ids, Tracer):
        return
    ids = np.asarray(segment_ids)
    negative = (ids < 0).any(axis=1)
    if negative.any():
        row = int(np.argmax(negative))
        raise ValueError(
            f"segment_ids must be 0 (padding) or positive; row {row} has {ids[row].min()}"
        )
    wrong = (ids[:, 1:] > 0) & ((ids[:, 1:] < ids[:, :-1]) | (ids[:, :-1] == 0))
    if wrong.any():
        row, i = (int(x[0]) for x in np.nonzero(wrong))
        raise ValueError(
            "segment_ids must never decrease, with padding (0) after all others; "
            f"row {row} goes from {ids[row, i]} to {ids[row, i + 1]} at token {i + 1}"
        )
