"""Convolution through real FFTs: t log t work and linear memory, for any length."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def fast_length(n: int) -> int:
    """The smallest even number >= n with no prime factor above 5: the lengths that every FFT library is quick at."""
    best = 2
    while best < n:
        best *= 2
    five = 1
    while five < best:
        three = five
        while three < best:
            even = three * 2
            while even < n:
                even *= 2
            best = min(best, even)
            three *= 3
        five *= 5
    return best


def lagged_conv_fft(
    x: Float[Array, "n m d"], kernel: Float[Array, "l d"], offset: int, t: int
) -> Float[Array, "n t d"]:
    """y_i = sum_q kernel[offset + i - q] * x_q for i in 0..t-1; lags outside the kernel have weight 0.

    A circular convolution, just long enough that nothing which wraps round lands on a wanted output. Spectra are in the
    precision of x and kernel, which the caller has promoted to float32 or wider.
    """
    return _circular(x, kernel[: offset + t], offset, t)


def _size(x, kernel, offset, t):
    return fast_length(max(offset + t, x.shape[1] + kernel.shape[0] - 1 - offset))


def _spectrum(x, size):
    """[..., t, d] -> [..., d, size / 2 + 1]: channels outside, so that the transform runs over contiguous memory."""
    return jnp.fft.rfft(x.swapaxes(-1, -2), n=size)


def _signal(spectrum, size, start, length):
    signal = jnp.fft.irfft(spectrum, n=size)
    return signal[..., start : start + length].swapaxes(-1, -2)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _circular(x, kernel, offset, t):
    size = _size(x, kernel, offset, t)
    return _signal(_spectrum(x, size) * _spectrum(kernel, size), size, offset, t)


def _forward(x, kernel, offset, t):
    return _circular(x, kernel, offset, t), (x, kernel)


def _backward(offset, t, saved, dy):
    """Both gradients are correlations, at the same circular length: dx = K* dY and dkernel = sum over rows of X* dY.

    Written out because JAX transposes a real FFT into a complex one of twice the work.
    """
    x, kernel = saved
    size = _size(x, kernel, offset, t)
    dy_spectrum = _spectrum(jnp.pad(dy, ((0, 0), (offset, 0), (0, 0))), size)
    dx = _signal(dy_spectrum * _spectrum(kernel, size).conj(), size, 0, x.shape[1])
    weights = jnp.sum(dy_spectrum * _spectrum(x, size).conj(), axis=0)
    return dx, _signal(weights, size, 0, kernel.shape[0])


_circular.defvjp(_forward, _backward)
