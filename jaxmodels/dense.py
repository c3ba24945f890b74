"""The projection that every module of the library uses."""

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from jaxmodels.typing import Dtype, Initializer


class Dense(nn.Module):
    """y = x W + b, with the leading dimensions of x flattened to one around the product.

    Parameters and numbers are those of nn.Dense. XLA's CPU backend forms the gradient of W from [b, t, d] operands in twice
    the time that it needs from [b t, d] (docs/performance_log.md).
    """

    features: int
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows features"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = x.reshape(-1, shape[0]) @ kernel
        if bias is not None:
            y = y + bias
        return y.reshape(*x.shape[:-1], self.features)
