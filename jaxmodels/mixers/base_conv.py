"""BaseConv, the gated convolution of Zoology: y = conv(u) * (W u + b) + u."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxmodels.dense import Dense
from jaxmodels.mixers.convolution import (
    ImplicitLongConvolution,
    LongConvolution,
    ShortConvolution,
    check_length,
    init_long_state,
)
from jaxmodels.mixers.segments import init_cursor, layout, zero_padding
from jaxmodels.typing import Dtype, Initializer, State


class BaseConv(nn.Module):
    """y = conv(u) * projection(u) + u, channel by channel (Arora et al. 2023, Zoology, equation 3).

    kernel_size k > 0 is a short convolution of k taps; its state is the last k - 1 inputs. kernel_size = -1 is a filter as
    long as the segment (up to max_len lags), implicit or explicit; its state GROWS WITH LENGTH: all inputs of the segment,
    min(max_len of init_state, max_len of the filter) of them. use_act puts SiLU on both factors.

    Raises ValueError for any other kernel_size, and for an unsegmented call longer than the long filter.
    """

    d_model: int
    kernel_size: int = 3
    implicit: bool = True  # only read when kernel_size is -1
    max_len: int = 1024  # longest lag of a long filter, plus one
    use_act: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_kernel_init: Initializer = nn.initializers.normal(0.02)  # unused: no output projection

    @property
    def _long(self) -> bool:
        if self.kernel_size != -1 and self.kernel_size < 1:
            raise ValueError(
                f"kernel_size must be at least 1, or -1 for a long filter, got {self.kernel_size}"
            )
        return self.kernel_size == -1

    def init_state(self, batch_size: int, max_len: int, dtype: Dtype = jnp.float32) -> State:
        if self._long:
            conv = init_long_state(batch_size, max_len, self.max_len, self.d_model, dtype)
        else:
            conv = jnp.zeros((batch_size, self.kernel_size - 1, self.d_model), dtype)
        return {"cursor": init_cursor(batch_size), "conv": conv}

    def legacy_state_elements(self, length: int) -> int:
        """Zoology's count: k d for a short filter (one input more than is kept here), length x d for a long one."""
        return self.d_model * (length if self._long else self.kernel_size)

    def _convolution(self) -> nn.Module:
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype, name="conv")
        if not self._long:
            return ShortConvolution(self.d_model, self.kernel_size, **kwargs)
        if not self.implicit:
            return LongConvolution(self.d_model, self.max_len, **kwargs)
        return ImplicitLongConvolution(
            self.d_model, self.max_len, kernel_init=self.kernel_init, **kwargs
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
        if self._long:
            check_length(t, self.max_len, where)
        x = zero_padding(x, where)
        mixed, conv = self._convolution()(x, None if state is None else state["conv"], where)
        gate = Dense(
            self.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="projection",
        )(x)
        if self.use_act:
            mixed, gate = nn.silu(mixed), nn.silu(gate)
        y = zero_padding(mixed * gate + x.astype(gate.dtype), where)
        return y, None if state is None else {"cursor": where.cursor, "conv": conv}
