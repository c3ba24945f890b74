"""Linear time and memory: the chunked engine of `pallas_kernels.linear_attention` with the Taylor map."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.based.feature_map import taylor_features
from pallas_kernels.linear_attention import chunked as engine
from pallas_kernels.linear_attention.one_chunk import Map

CHUNK = (
    128  # fastest of 32, 64, 128, 256 on two CPU cores at f = 16, v = 64 (docs/performance_log.md)
)

SUMS_CHUNK = 512  # for sums alone: fewer, larger steps


def taylor_weights(s: Any, f: int) -> Any:
    """phi(q) . phi(k) = 1 + s + s^2/2 from q . k."""
    s = s * f**-0.5
    return 1 + s * (1 + 0.5 * s)


TAYLOR = Map(taylor_features, taylor_weights)


def taylor_law(normalize: bool, epsilon: float) -> engine.Law:
    return engine.Law(TAYLOR, ones=True, normalize=normalize, epsilon=epsilon)


def forward(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    state: Float[Array, "b g e v1"] | None,
    ids: Int[Array, "b t"] | None,
    *,
    normalize: bool,
    epsilon: float,
    chunk: int | None = None,
) -> tuple[Float[Array, "b t h v"], Any, Float[Array, "b g e v1"]]:
    """y, the denominators [b, t, h] and the final state; padding arrives as zeros in q, k and v."""
    law = taylor_law(normalize, epsilon)
    return engine.forward(q, k, v, None, state, ids, law=law, chunk=chunk or CHUNK)


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
    *,
    normalize: bool,
    epsilon: float,
    chunk: int | None = None,
) -> tuple[Array, Array, Array, Float[Array, "b g e v1"] | None]:
    """Gradients of q, k, v and the initial state."""
    law, arrays = taylor_law(normalize, epsilon), (state, ids, y, den, dy, dstate)
    dq, dk, dv, _, dbefore = engine.backward(q, k, v, None, *arrays, law=law, chunk=chunk or CHUNK)
    return dq, dk, dv, dbefore


def final_state(
    k: Float[Array, "b t g f"], v: Float[Array, "b t g v"], ids: Int[Array, "b t"] | None
) -> Float[Array, "b g e v1"]:
    """The sum of phi(k) [v, 1]^T over the last segment, for which no query is needed."""
    law = taylor_law(normalize=False, epsilon=0.0)
    return engine.final_state(k, v, None, None, ids, law=law, chunk=SUMS_CHUNK)
