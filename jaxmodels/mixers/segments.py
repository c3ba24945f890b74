"""Where every token of a call stands: segments, padding, and what the state remembers of them.

A row of `segment_ids` holds packed documents: positive ids that never decrease, then zeros. Zero is padding: it contributes
nothing and does not advance the state; a change of positive id resets. Padding is only ever trailing here, because the
models move it there at their door (`jaxmodels.models.padding`).

Every mixer state carries a cursor, so that a sequence can be cut anywhere, at a segment boundary too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Shaped

Cursor = dict[str, Int[Array, " b"]]


def init_cursor(batch_size: int) -> Cursor:
    """The cursor of an empty state: no segment yet (id 0), no token of it seen."""
    return {
        "segment": jnp.zeros(batch_size, jnp.int32),
        "position": jnp.zeros(batch_size, jnp.int32),
    }


class Layout(NamedTuple):
    """What `layout` finds out about the tokens of one call."""

    segment_ids: Int[Array, "b t"] | None  # None: every token is real and belongs to one segment
    positions: Int[Array, "b t"]  # position inside the segment, counting what the state has seen
    continues: Bool[Array, " b"]  # the first token goes on with the segment that the state holds
    history: Int[Array, " b"]  # tokens of the first segment that lie before this call
    lengths: Int[Array, " b"]  # real tokens in this call
    cursor: Cursor  # the cursor after this call

    @property
    def real(self) -> Bool[Array, "b t"] | None:
        return None if self.segment_ids is None else self.segment_ids > 0

    @property
    def first_segment(self) -> Int[Array, " b"] | None:
        """The id that the state's history carries when it is still wanted."""
        return None if self.segment_ids is None else self.segment_ids[:, 0]

    @property
    def in_last_segment(self) -> Bool[Array, "b t"]:
        """Tokens that the state after this call still remembers."""
        if self.segment_ids is None:
            return jnp.ones(self.positions.shape, bool)
        ids = self.segment_ids
        return (ids > 0) & (ids == self.cursor["segment"][:, None])


def layout(
    segment_ids: Int[Array, "b t"] | None, cursor: Cursor | None, batch_size: int, length: int
) -> Layout:
    """Positions, masks and the next cursor for `length` tokens that follow `cursor`.

    Raises ValueError for ids that decrease, are negative, or have padding before a real token, when the ids are concrete;
    traced ids are taken as they are (the models check and clamp once, at their door).
    """
    before = init_cursor(batch_size) if cursor is None else cursor
    index = jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
        position = before["position"]
        return Layout(
            None,
            position[:, None] + index,
            jnp.ones(batch_size, bool),
            position,
            jnp.full(batch_size, length, jnp.int32),
            {"segment": jnp.maximum(before["segment"], 1), "position": position + length},
        )
    check_segment_ids(segment_ids)
    ids = segment_ids.astype(jnp.int32)
    first = ids[:, 0]
    continues = (first == before["segment"]) | (first == 0)
    history = jnp.where(continues, before["position"], 0)
    starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    start_index = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    positions = index - start_index + jnp.where(start_index == 0, history[:, None], 0)
    lengths = jnp.sum(ids > 0, axis=1, dtype=jnp.int32)
    last = jnp.maximum(lengths - 1, 0)[:, None]
    empty = lengths == 0
    after = {
        "segment": jnp.where(empty, before["segment"], jnp.take_along_axis(ids, last, 1)[:, 0]),
        "position": jnp.where(
            empty, before["position"], jnp.take_along_axis(positions, last, 1)[:, 0] + 1
        ),
    }
    positions = jnp.where(ids > 0, positions, 0)
    return Layout(ids, positions, continues, history, lengths, after)


def check_segment_ids(segment_ids: Int[Array, "b t"]) -> None:
    """ValueError when concrete ids break the contract; traced ids cannot be looked at."""
    if isinstance(segment_ids, Tracer):
        return
    ids = jax.device_get(segment_ids)
    if (ids < 0).any():
        raise ValueError("segment_ids must be 0 (padding) or positive; found a negative id")
    real = ids > 0
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError("a mixer takes padding (segment id 0) only at the end of a row")
    if ((ids[:, 1:] < ids[:, :-1]) & real[:, 1:]).any():
        raise ValueError("positive segment_ids must not decrease along a row")


def zero_padding(x: Shaped[Array, "b t ..."], where: Layout) -> Shaped[Array, "b t ..."]:
    """x with padded positions set to 0, whatever they held (NaN included)."""
    if where.real is None:
        return x
    return jnp.where(where.real.reshape(where.real.shape + (1,) * (x.ndim - 2)), x, 0)


def keep_if_continues(state: Any, where: Layout) -> Any:
    """The arrays of a state, emptied in the rows whose call starts a new segment."""
    if where.segment_ids is None:
        return state

    def keep(x):
        return jnp.where(where.continues.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0)

    return jax.tree.map(keep, state)


def write_tokens(
    buffer: Shaped[Array, "b m ..."],
    values: Shaped[Array, "b t ..."],
    slots: Int[Array, "b t"],
    keep: Bool[Array, "b t"],
) -> Shaped[Array, "b m ..."]:
    """buffer with values[i, j] stored at slot slots[i, j] wherever keep[i, j]; slots outside the buffer are dropped."""
    size = buffer.shape[1]
    slots = jnp.where(keep & (slots >= 0) & (slots < size), slots, size)
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slots].set(values.astype(buffer.dtype), mode="drop")
