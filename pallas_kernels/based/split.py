"""Exact sequence split: a sequence as pieces that run at once, each from the state that the pieces before it leave.

There is no decay, so the state before a piece is a sum: the initial state, and what each earlier piece adds, where no segment
starts in between. One pass over k and v adds up the pieces; a small product sums their sums; then all pieces run as rows of a
batch. Backward is the mirror image: what a piece's queries ask of the state before it is summed over the later pieces into the
gradient of what an earlier piece adds.

The extra passes read k and v (forward), and k, v, q and dy (backward), once more. On H200 the serial walk has one block of
threads per row and head, and 16 heads leave seven eighths of the chip idle; there it pays. `sharded.py` is the same over devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.based import chunked
from pallas_kernels.linear_attention import chunked as engine

BLOCKS = {
    "gpu": 132
}  # multiprocessors of H100 and H200. A TPU core walks its grid in order: a split gains nothing
SHORTEST_PIECE = 512


def pieces_for(kernel: str, rows: int, t: int) -> int:
    """Pieces for `rows` = batch x heads: the most powers of two that still find a free block, each SHORTEST_PIECE long.

    1 wherever rows fill half of the chip, for other kernels than the GPU's, and for lengths that do not divide.
    """
    pieces = 1
    while (
        2 * pieces * rows <= BLOCKS.get(kernel, 0)
        and t % (2 * pieces) == 0
        and t // (2 * pieces) >= SHORTEST_PIECE
    ):
        pieces *= 2
    return pieces


class Links(NamedTuple):
    """Which sums make up the state before each piece p (p = 0 .. P; the last is the final state)."""

    adds: Bool[Array, "b p1 p"]  # what piece p adds is part of the state before piece p1
    initial: Bool[Array, "b p1"]  # the initial state is
    reads: Bool[Array, "b p"]  # the first token of the piece goes on with the state before it


def links(first: Int[Array, "b p"], last: Int[Array, "b p"]) -> Links:
    """From the first id of every piece and its largest (0 where it is all padding)."""
    p = first.shape[1]
    # The id that the state before each piece belongs to.
    owner = jax.lax.cummax(jnp.concatenate([first[:, :1], last], axis=1), axis=1)
    earlier = jnp.arange(p + 1)[:, None] > jnp.arange(p)
    adds = earlier & (last[:, None] == owner[..., None]) & (last[:, None] > 0)
    return Links(adds, owner == first[:, :1], first == owner[:, :-1])


def combine(
    chain: Links, added: Float[Array, "b p g e v"], state: Float[Array, "b g e v"] | None
) -> tuple[Float[Array, "b p g e v"], Float[Array, "b g e v"]]:
    """The state that each piece starts from, and the final one."""
    total = jnp.einsum(
        "bpq,bqgev->bpgev", chain.adds.astype(added.dtype), added, precision="highest"
    )
    if state is not None:
        total = total + jnp.where(chain.initial[..., None, None, None], state[:, None], 0)
    return jnp.where(chain.reads[..., None, None, None], total[:, :-1], 0), total[:, -1]


def forward(
    run: Callable[..., Any], pieces: int, q: Any, k: Any, v: Any, state: Any, ids: Any, **fixed: Any
) -> Any:
    """`run`, a forward of the contract in `dispatch`, on `pieces` pieces of every sequence."""
    cut = _Cut(q, ids, pieces)
    start, final = _starts(cut, k, v, state)
    y, den, _ = run(*cut.rows((q, k, v)), _merge(start), cut.row_ids, **fixed)
    return *cut.back((y, den)), final


def backward(
    run: Callable[..., Any],
    pieces: int,
    q: Any,
    k: Any,
    v: Any,
    state: Any,
    ids: Any,
    y: Any,
    den: Any,
    dy: Any,
    dstate: Any,
    **fixed: Any,
) -> Any:
    """`run`, a backward of the contract in `dispatch`, on pieces."""
    cut = _Cut(q, ids, pieces)
    start, _ = _starts(cut, k, v, state)
    asked = _asked(cut, q, y, den, dy, k.shape[2], **fixed)
    if dstate is None:
        dstate = jnp.zeros_like(start[:, 0])
    asked = jnp.where(cut.links.reads[..., None, None, None], asked, 0)
    asked = jnp.concatenate([asked, dstate[:, None]], axis=1)
    dadded = jnp.einsum(
        "bpq,bpgev->bqgev", cut.links.adds.astype(asked.dtype), asked, precision="highest"
    )
    rows = cut.rows((q, k, v)), cut.rows((y, den, dy))
    *gradients, _ = run(*rows[0], _merge(start), cut.row_ids, *rows[1], _merge(dadded), **fixed)
    dbefore = None
    if state is not None:
        dbefore = jnp.sum(jnp.where(cut.links.initial[..., None, None, None], asked, 0), axis=1)
    return *cut.back(tuple(gradients)), dbefore


class _Cut:
    """[b, t, ...] to [b pieces, length, ...] and back; a last piece that is not full ends in padding."""

    def __init__(self, q, ids, pieces):
        self.b, self.t = q.shape[:2]
        self.pieces, self.length = pieces, -(-self.t // pieces)
        if ids is None and self.length * pieces != self.t:
            ids = jnp.ones((self.b, self.t), jnp.int32)
        self.row_ids = None if ids is None else self.rows(ids)
        if self.row_ids is None:
            ends = (jnp.ones((self.b, pieces), jnp.int32),) * 2
        else:
            by_piece = self.row_ids.reshape(self.b, pieces, -1)
            ends = by_piece[..., 0], jnp.max(by_piece, axis=2)
        self.links = links(*ends)

    def rows(self, arrays: Any) -> Any:
        def one(x):
            short = self.length * self.pieces - self.t
            x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)) if short else x
            return x.reshape(self.b * self.pieces, self.length, *x.shape[2:])

        return jax.tree.map(one, arrays)

    def back(self, arrays: Any) -> Any:
        whole = lambda x: x.reshape(self.b, -1, *x.shape[2:])[:, : self.t]
        return jax.tree.map(whole, arrays)


def _merge(x: Float[Array, "b p ..."]) -> Float[Array, "bp ..."]:
    return x.reshape(-1, *x.shape[2:])


def _starts(cut: _Cut, k, v, state):
    added = chunked.final_state(cut.rows(k), cut.rows(v), cut.row_ids)
    return combine(cut.links, added.reshape(cut.b, cut.pieces, *added.shape[1:]), state)


def _asked(cut: _Cut, q, y, den, dy, g, *, normalize, epsilon):
    """The gradient of the state before each piece, from the piece's own queries: the sum of phi(q) [dnum, dden]^T."""
    q, y, den, dy = (cut.rows(x) for x in (q, y, den, dy))
    law = chunked.taylor_law(normalize, epsilon)
    ids = cut.row_ids
    seen = None if ids is None else (ids > 0) & (ids == ids[:, :1])
    dout = engine.output_gradient(y, den, dy, seen, law)

    def tokens(x):  # the query heads of a group become tokens of it
        x = x.reshape(*x.shape[:2], g, -1, x.shape[-1])
        return jnp.swapaxes(x, 2, 3).reshape(x.shape[0], -1, g, x.shape[-1])

    asked = engine.final_state(
        tokens(q),
        tokens(dout),
        None,
        None,
        None,
        law=law._replace(ones=False),
        chunk=chunked.SUMS_CHUNK,
    )
    return asked.reshape(cut.b, cut.pieces, *asked.shape[1:])
