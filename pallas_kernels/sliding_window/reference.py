"""The specification of the op: the reference of attention, with the window in its mask."""

from jaxtyping import Array, Float

from pallas_kernels.attention import reference
from pallas_kernels.attention.inputs import Inputs


def attention(inputs: Inputs, rate: float, window: int) -> Float[Array, "b t h v"]:
    """Weights [b, h, t, s], all but the window masked."""
    *arrays, scale = inputs
    return reference.attention(*arrays, scale=scale, rate=rate, window=window)
