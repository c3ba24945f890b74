"""Channel mixers: the position-wise half of a block."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxmodels.dense import Dense
from jaxmodels.typing import Dtype, Initializer


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), hidden width multiplier * d, with biases (Zoology's state mixer, GPT-2's MLP)."""

    d_model: int
    multiplier: float = 4.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = round(self.multiplier * self.d_model)
        hidden = Dense(width, kernel_init=self.kernel_init, name="fc1", **common)(x)
        out = Dense(self.d_model, kernel_init=self.out_kernel_init, name="fc2", **common)
        return out(nn.gelu(hidden, approximate=False))


class SwiGLU(nn.Module):
    """fc2(up(x) * silu(gate(x))), no biases (arXiv 2002.05202)."""

    d_model: int
    multiplier: float = 2.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        common = dict(use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        width = round(self.multiplier * self.d_model)
        up = Dense(width, kernel_init=self.kernel_init, name="up", **common)(x)
        gate = Dense(width, kernel_init=self.kernel_init, name="gate", **common)(x)
        out = Dense(self.d_model, kernel_init=self.out_kernel_init, name="fc2", **common)
        return out(up * nn.silu(gate))


CHANNEL_MIXERS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "swiglu": SwiGLU}
