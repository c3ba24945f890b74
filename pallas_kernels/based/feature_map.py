"""The second-order Taylor feature map, packed by rolls.

phi(q) . phi(k) = 1 + s + s^2 / 2  with  s = q . k / sqrt(f),  f the width of q and k.

The quadratic term has f(f+1)/2 distinct products. They are laid out as rolls, roll r holding x_i x_(i-r mod f) for every i:
each roll is f wide, needs no gather, and pairs every two indices exactly once over r = 0 .. f/2 (for even f the last roll
would list its pairs twice and is cut to f/2). So the layout is

    [1,  x / f^(1/4),  roll 0 / sqrt(2f),  roll 1 / sqrt(f),  ...,  roll f//2 / sqrt(f)]     1 + f + f(f+1)/2 wide

153 at f = 16, where the unpacked [1, x, vec(x x^T)] of the published code has 273.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def expanded_width(f: int) -> int:
    """Width e of phi(x): 1 + f + f(f+1)/2."""
    return 1 + f + f * (f + 1) // 2


@functools.cache
def _pairs(f: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left index, right index and weight of every packed quadratic feature."""
    left, right, weight = [], [], []
    for r in range(f // 2 + 1):
        width = f // 2 if f % 2 == 0 and r == f // 2 else f
        i = np.arange(width)
        left.append(i)
        right.append((i - r) % f)
        weight.append(np.full(width, (2 * f if r == 0 else f) ** -0.5))
    return np.concatenate(left), np.concatenate(right), np.concatenate(weight)


@functools.cache
def _factors(f: int) -> tuple[np.ndarray, np.ndarray]:
    """(A, a) such that x A + a = [left factors, right factors] of phi(x); a column of A holds at most one entry."""
    left, right, weight = _pairs(f)
    e, quadratic = expanded_width(f), 1 + f + np.arange(left.size)
    A, a = np.zeros((f, 2 * e)), np.zeros(2 * e)
    a[0] = 1.0
    a[e : e + 1 + f] = 1.0
    A[np.arange(f), 1 + np.arange(f)] = f**-0.25
    A[left, quadratic] = weight
    A[right, e + quadratic] = 1.0
    return A, a


def taylor_features(x: Float[Array, "*rows f"]) -> Float[Array, "*rows e"]:
    """phi(x), so that phi(q) . phi(k) = 1 + s + s^2/2 with s = q . k / sqrt(f).

    One product with a one-hot matrix picks the two factors of every feature: its gradient is again a matrix product, where
    the gradient of a gather would be a scatter.
    """
    A, a = (jnp.asarray(m, x.dtype) for m in _factors(x.shape[-1]))
    left, right = jnp.split(jnp.matmul(x, A, precision="highest") + a, 2, axis=-1)
    return left * right


def unpack_state(state: Float[Array, "*rows e v"], f: int) -> Float[Array, "*rows u v"]:
    """A packed state in the published layout of u = 1 + f + f^2 rows: [1, x / f^(1/4), vec(x x^T) / sqrt(2f)]."""
    _require_width(state, f)
    left, right, weight = _pairs(f)
    quadratic = state[..., 1 + f :, :] * jnp.asarray((2 * f) ** -0.5 / weight, state.dtype)[:, None]
    square = jnp.zeros(state.shape[:-2] + (f, f, state.shape[-1]), state.dtype)
    square = square.at[..., left, right, :].set(quadratic).at[..., right, left, :].set(quadratic)
    flat = square.reshape(state.shape[:-2] + (f * f, state.shape[-1]))
    return jnp.concatenate([state[..., : 1 + f, :], flat], axis=-2)


def pack_state(state: Float[Array, "*rows u v"], f: int) -> Float[Array, "*rows e v"]:
    """The inverse of `unpack_state`. The quadratic part must be symmetric, as every sum of x x^T is."""
    if state.shape[-2] != 1 + f + f * f:
        raise ValueError(
            f"an unpacked state of f={f} has {1 + f + f * f} rows, not {state.shape[-2]}"
        )
    left, right, weight = _pairs(f)
    square = state[..., 1 + f :, :].reshape(state.shape[:-2] + (f, f, state.shape[-1]))
    quadratic = (
        square[..., left, right, :] * jnp.asarray(weight * (2 * f) ** 0.5, state.dtype)[:, None]
    )
    return jnp.concatenate([state[..., : 1 + f, :], quadratic], axis=-2)


def _require_width(state: Float[Array, "*rows e v"], f: int) -> None:
    if state.shape[-2] != expanded_width(f):
        raise ValueError(
            f"a packed state of f={f} has {expanded_width(f)} rows, not {state.shape[-2]}"
        )
