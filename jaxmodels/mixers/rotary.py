"""Rotary position embedding (RoFormer, arXiv 2104.09864), halves rotated against each other as in GPT-NeoX."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "b t h k"],
    positions: Int[Array, "b t"],
    fraction: float,
    base: float = 10_000.0,
) -> Float[Array, "b t h k"]:
    """The first components of each head turned by angles that grow with the position.

    With r = int(fraction k) and n = ceil(r / 2) pairs (x_i, x_(i+n)), i < n, at position p:

        y_i     = x_i cos(a_i) - x_(i+n) sin(a_i)        a_i = p base^(-2 i / r)
        y_(i+n) = x_(i+n) cos(a_i) + x_i sin(a_i)

    The other components stay. An odd r turns r + 1 components, as the published BASED checkpoints do. Angles are computed
    in float32 or wider; the result has x's dtype. Raises ValueError for a fraction outside [0, 1] or n pairs that do not fit.
    """
    width = x.shape[-1]
    if not 0 <= fraction <= 1:
        raise ValueError(f"rotary_fraction must be in [0, 1], not {fraction}")
    turned = int(round(fraction * width, 6))
    n = -(-turned // 2)
    if 2 * n > width:
        raise ValueError(
            f"rotary_fraction={fraction} of a head width of {width} needs {2 * n} components"
        )
    if n == 0:
        return x
    acc = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-2.0 * jnp.arange(n, dtype=acc) / turned)
    angles = positions[:, :, None, None].astype(acc) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second, rest = x[..., :n].astype(acc), x[..., n : 2 * n].astype(acc), x[..., 2 * n :]
    turned_parts = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned_parts), rest], axis=-1)
