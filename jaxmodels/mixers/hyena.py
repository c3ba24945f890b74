"""Hyena: a gated long convolution whose filter is a small sine network of the lag."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxmodels.dense import Dense
from jaxmodels.mixers.convolution import (
    ShortConvolution,
    check_length,
    convolve_long,
    filter_dtype,
    filter_features,
    init_long_state,
    lags_needed,
)
from jaxmodels.mixers.segments import init_cursor, layout, zero_padding
from jaxmodels.typing import Dtype, Initializer, State


def decay_rates(d_model: int) -> Float[np.ndarray, " d"]:
    """Rates at which each channel's filter falls to 1/100: from after 1.5 max_len in channel 0 to 0.3 max_len in the last."""
    return np.linspace(-math.log(0.01) / 1.5, -math.log(0.01) / 0.3, d_model)


class HyenaFilter(nn.Module):
    """kernel[p, c] = mlp(z_p)[c] * exp(-p / (max_len - 1) * rate_c), and the skip weight of every channel.

    mlp: 3 -> order -> order -> order -> d_model with x -> sin(freq * x) between, one freq [order] shared by all layers, the
    last layer without bias. z [max_len, 3] starts as `filter_features` and is trained like everything else, as it is under
    the plain AdamW of Zoology; the modulation keeps the untrained position, and its rates are fixed.
    """

    d_model: int
    max_len: int
    order: int = 64
    num_inner_mlps: int = 2
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, length: int) -> tuple[Float[Array, "m d"], Float[Array, " d"]]:
        def start(key, shape, dtype):
            return jnp.asarray(filter_features(shape[0]), dtype)

        def dense(features, index, **kwargs):
            return Dense(
                features,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                name=f"implicit_filter_{index}",
                **kwargs,
            )

        z = self.param("z", start, (self.max_len, 3), self.param_dtype)
        freq = self.param("freq", nn.initializers.ones, (self.order,), self.param_dtype)
        skip = self.param("bias", nn.initializers.normal(1.0), (self.d_model,), self.param_dtype)
        h, freq = z[:length].astype(self.dtype), freq.astype(self.dtype)
        for index in range(self.num_inner_mlps + 1):
            h = jnp.sin(freq * dense(self.order, 2 * index)(h))
        h = dense(self.d_model, 2 * self.num_inner_mlps + 2, use_bias=False)(h)
        position = filter_features(self.max_len)[:length, :1]
        decay = np.exp(-position * decay_rates(self.d_model))
        return h * jnp.asarray(decay, self.dtype), skip.astype(self.dtype)


class Hyena(nn.Module):
    """x1, x2, v = short_conv(in_proj u);  y = out_proj(x2 * (kernel * (x1 v) + D x1 v)), with * in the bracket a convolution.

    Order 2, one head, as in Zoology (Poli et al. 2023, section 3; Arora et al. 2023). The state is the short convolution's
    last inputs and every gated input of the segment: it GROWS WITH LENGTH, up to min(max_len of init_state, max_len of the
    filter) tokens. One decoding step costs O(max_len d) and evaluates the filter anew.

    Raises ValueError for an unsegmented call longer than the filter's max_len.
    """

    d_model: int
    max_len: int = 1024  # longest lag of the filter, plus one; also the unit of its positions
    filter_order: int = 64
    num_inner_mlps: int = 2
    short_kernel_size: int = 3
    dropout: float = 0.0  # on x1 * v
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_kernel_init: Initializer = nn.initializers.normal(0.02)

    def init_state(self, batch_size: int, max_len: int, dtype: Dtype = jnp.float32) -> State:
        short = jnp.zeros((batch_size, self.short_kernel_size - 1, 3 * self.d_model), dtype)
        return {
            "cursor": init_cursor(batch_size),
            "short": short,
            "long": init_long_state(batch_size, max_len, self.max_len, self.d_model, dtype),
        }

    def legacy_state_elements(self, length: int) -> int:
        """Zoology's count: one input of width d per token."""
        return self.d_model * length

    def _dense(self, features: int, kernel_init: Initializer, name: str) -> Dense:
        return Dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel_init,
            name=name,
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: State | None = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], State | None]:
        b, t, _ = x.shape
        where = layout(segment_ids, None if state is None else state["cursor"], b, t)
        check_length(t, self.max_len, where)
        x = zero_padding(x, where)
        u = zero_padding(self._dense(3 * self.d_model, self.kernel_init, "in_proj")(x), where)
        # Without the barrier XLA on a CPU forms the gradient of u three times over, once transposed: a third more time.
        u = jax.lax.optimization_barrier(u)
        u, short = ShortConvolution(
            3 * self.d_model,
            self.short_kernel_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="short_filter",
        )(u, None if state is None else state["short"], where)
        x1, x2, v = jnp.split(u, 3, axis=-1)
        v = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(v * x1)
        v = zero_padding(v, where)
        history = None if state is None else state["long"]
        kernel, skip = HyenaFilter(
            self.d_model,
            self.max_len,
            self.filter_order,
            self.num_inner_mlps,
            filter_dtype(v, self.dtype),
            self.param_dtype,
            self.kernel_init,
            name="filter_fn",
        )(lags_needed(v, history, self.max_len))
        mixed, history = convolve_long(v, kernel, history, where)
        mixed = (mixed + skip.astype(v.dtype) * v) * x2
        y = zero_padding(self._dense(self.d_model, self.out_kernel_init, "out_proj")(mixed), where)
        return y, None if state is None else {
            "cursor": where.cursor,
            "short": short,
            "long": history,
        }
