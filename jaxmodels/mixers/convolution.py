"""Depthwise causal convolutions with their streaming state: short taps, and long filters.

These are parts of mixers, not mixers: y, new_state = conv(x, state, where), with `where` the Layout of the call. They expect
padded positions of x to be zero already (`segments.zero_padding`) and leave the zeroing of their output to the mixer.

A filter of length m is a row per lag: kernel[0] meets the token itself. Source: Zoology (Arora et al. 2023), BaseConv;
Hyena (Poli et al. 2023).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Shaped

from jaxmodels.mixers.segments import Layout
from jaxmodels.typing import Dtype, Initializer
from pallas_kernels.long_conv import long_conv, long_conv_history


def torch_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch gives the weight and the bias of a convolution or a linear layer."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class ShortConvolution(nn.Module):
    """y_i = bias + sum over lag < kernel_size of kernel[lag] * x_{i - lag}, inside the segment of i.

    Parameters kernel [kernel_size, d] (row = lag; torch's Conv1d holds the same rows in the opposite order) and bias [d].
    State: the last kernel_size - 1 inputs of the segment, [b, kernel_size - 1, d], newest last, zeros before its start.
    """

    d_model: int
    kernel_size: int = 3
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def init_state(self, batch_size: int, dtype: Dtype = jnp.float32) -> Float[Array, "b r d"]:
        return jnp.zeros((batch_size, self.kernel_size - 1, self.d_model), dtype)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], state: Float[Array, "b r d"] | None, where: Layout
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b r d"] | None]:
        init = torch_uniform(self.kernel_size)
        shape = (self.kernel_size, self.d_model)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        bias = self.param("bias", init, shape[1:], self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        t, reach = x.shape[1], self.kernel_size - 1
        if state is None:
            tokens = jnp.pad(x, ((0, 0), (reach, 0), (0, 0)))
        else:
            tokens = jnp.concatenate([state.astype(x.dtype), x], axis=1)
        y = bias.astype(wide)
        for lag in range(self.kernel_size):
            tap = tokens[:, reach - lag : reach - lag + t]
            if lag and where.segment_ids is not None:
                # One mask for a segment's start and for a history that is too short.
                tap = jnp.where((where.positions >= lag)[..., None], tap, 0)
            y = y + kernel[lag].astype(wide) * tap
        return y.astype(x.dtype), None if state is None else _last_inputs(tokens, state, where)


def _last_inputs(tokens, state, where):
    """The newest `state.shape[1]` inputs of the segment that the call ends in; `tokens` = old state, then the call."""
    reach = state.shape[1]
    if where.segment_ids is None:
        return tokens[:, tokens.shape[1] - reach :].astype(state.dtype)
    index = where.lengths[:, None] + jnp.arange(reach)
    latest = jnp.take_along_axis(tokens, index[..., None], axis=1)
    back = reach - jnp.arange(reach)
    inside = back <= where.cursor["position"][:, None]
    return jnp.where(inside[..., None], latest, 0).astype(state.dtype)


def filter_features(max_len: int) -> Float[np.ndarray, "m 3"]:
    """Position features of an implicit filter: [p / (max_len - 1), cos(f w), -sin(f w)], w = 2 pi p / max_len, f = 1e-4.

    The one frequency band that Zoology's width of 3 leaves is f = 1e-4, so the filter is in effect a function of the first
    feature; kept because its published numbers were made with it.
    """
    p = np.arange(max_len)
    angle = 1e-4 * 2 * np.pi * p / max_len
    return np.stack([np.linspace(0, 1, max_len), np.cos(angle), -np.sin(angle)], axis=1)


class ImplicitFilter(nn.Module):
    """kernel[p] = W2 relu(W1 features(p) + b1) + b2: a two-layer perceptron of the position (Zoology's implicit filter)."""

    d_model: int
    max_len: int
    hidden: int = 16
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "m d"]:
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init)
        features = jnp.asarray(filter_features(self.max_len)[:length], self.dtype)
        hidden = nn.relu(nn.Dense(self.hidden, name="mlp_0", **kwargs)(features))
        return nn.Dense(self.d_model, name="mlp_2", **kwargs)(hidden)


class ExplicitFilter(nn.Module):
    """kernel = a free parameter [max_len, d], N(0, 1) at the start as in Zoology."""

    d_model: int
    max_len: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "m d"]:
        init = nn.initializers.normal(1.0)
        kernel = self.param("kernel", init, (self.max_len, self.d_model), self.param_dtype)
        return kernel[:length].astype(self.dtype)


class LongConvolution(nn.Module):
    """y_i = x_i + sum over j <= i in the segment of i of kernel[i - j] * x_j, with an explicit filter.

    Lags of max_len or more have weight 0. State: the segment's inputs, which grow with length: see `init_long_state`.
    """

    d_model: int
    max_len: int = 1024
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], state: Float[Array, "b m d"] | None, where: Layout
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b m d"] | None]:
        make = ExplicitFilter(
            self.d_model, self.max_len, filter_dtype(x, self.dtype), self.param_dtype, name="filter"
        )
        y, state = convolve_long(x, make(lags_needed(x, state, self.max_len)), state, where)
        return y + x, state


class ImplicitLongConvolution(nn.Module):
    """The same, y_i = x_i + sum over j <= i of kernel[i - j] * x_j, with the filter of `ImplicitFilter`."""

    d_model: int
    max_len: int = 1024
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], state: Float[Array, "b m d"] | None, where: Layout
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b m d"] | None]:
        make = ImplicitFilter(
            self.d_model,
            self.max_len,
            dtype=filter_dtype(x, self.dtype),
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="filter",
        )
        y, state = convolve_long(x, make(lags_needed(x, state, self.max_len)), state, where)
        return y + x, state


def filter_dtype(x: Shaped[Array, "..."], dtype: Dtype | None) -> Dtype:
    """Filters are computed in float32 or wider: they are small, and positions up to max_len need the digits."""
    return jnp.promote_types(x.dtype if dtype is None else dtype, jnp.float32)


def lags_needed(
    x: Shaped[Array, "b t d"], state: Shaped[Array, "b m d"] | None, max_len: int
) -> int:
    """How much of a filter one call can reach: its own length, and the stored history."""
    reach = x.shape[1] + (0 if state is None else state.shape[1])
    return min(max_len, reach)


def check_length(t: int, max_len: int, where: Layout) -> None:
    """ValueError if an unsegmented call is longer than the filter can be; segments of a packed row may each be shorter."""
    if where.segment_ids is None and t > max_len:
        raise ValueError(
            f"a call of {t} tokens is longer than the filter: max_len is {max_len}; raise max_len or pass segment_ids"
        )


def init_long_state(
    batch_size: int, max_len: int, filter_len: int, d_model: int, dtype: Dtype = jnp.float32
) -> Float[Array, "b m d"]:
    """The state of a long convolution GROWS WITH LENGTH: it is every input of the segment, up to min(max_len, filter_len).

    A ring: slot p mod m holds position p, zeros where there is no token. Past m tokens the oldest are forgotten, which is
    exact when m is the filter's length.
    """
    return jnp.zeros((batch_size, min(max_len, filter_len), d_model), dtype)


def convolve_long(
    x: Float[Array, "b t d"],
    kernel: Float[Array, "l d"],
    state: Float[Array, "b m d"] | None,
    where: Layout,
) -> tuple[Float[Array, "b t d"], Float[Array, "b m d"] | None]:
    """Long convolution of the call and of the history it continues, and the history after it."""
    y = long_conv(x, kernel, segment_ids=where.segment_ids)
    if state is None:
        return y, None
    past = long_conv_history(state.astype(x.dtype), where.history, kernel, x.shape[1])
    if where.segment_ids is not None:
        continuing = (where.segment_ids == where.segment_ids[:, :1]) & (where.segment_ids > 0)
        past = jnp.where(continuing[..., None], past, 0)
    return y + past, _write_ring(state, x, where)


def _write_ring(ring, x, where):
    """ring with the call's tokens in it, by gather: each slot looks up the newest position that belongs there."""
    m, t = ring.shape[1], x.shape[1]
    end = where.cursor["position"][:, None]
    # How many tokens the newest position that belongs to a slot lies behind the last token.
    back = (end - 1 - jnp.arange(m)) % m
    token = where.lengths[:, None] - 1 - back
    fresh = jnp.take_along_axis(x, jnp.clip(token, 0, t - 1)[..., None], axis=1)
    kept = jnp.where((token >= 0)[..., None], fresh.astype(ring.dtype), ring)
    return jnp.where((back < end)[..., None], kept, 0)
