"""The whole sequence as one chunk: one t x t product, features only for a given state and for the final one."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.based import chunked


def forward(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    state: Float[Array, "b g e v1"] | None,
    ids: Int[Array, "b t"] | None,
    **fixed: Any,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b t h"], Float[Array, "b g e v1"]]:
    """As `chunked.forward`."""
    return chunked.forward(q, k, v, state, ids, **fixed, chunk=q.shape[1])


def backward(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    state: Float[Array, "b g e v1"] | None,
    ids: Int[Array, "b t"] | None,
    y: Float[Array, "b t h v"],
    den: Float[Array, "b t h"],
    dy: Float[Array, "b t h v"],
    dstate: Float[Array, "b g e v1"] | None,
    **fixed: Any,
) -> tuple[Array, Array, Array, Float[Array, "b g e v1"] | None]:
    """As `chunked.backward`."""
    kept = (state, ids, y, den, dy, dstate)
    return chunked.backward(q, k, v, *kept, **fixed, chunk=q.shape[1])
