"""Pre-norm residual blocks around any sequence mixer."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxmodels.channel.mlp import CHANNEL_MIXERS
from jaxmodels.typing import Dtype, State

NORMS: dict[str, Callable[..., nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
CHANNELS = (None, "identity", *CHANNEL_MIXERS)


class Block(nn.Module):
    """x <- x + drop(mixer(norm1(x))); x <- x + drop(channel(norm2(x))).

    channel None leaves the second half out. channel "identity" is Zoology's `state_mixer=Identity`: norm2(x) itself is
    added, which every published MQAR figure has.

    The residual stream is float32 or wider. The mixer's and channel's outputs are sown into `intermediates` as
    "mixer_out" and "channel_out", so that another framework's layers can be compared one by one.
    """

    mixer: nn.Module
    d_model: int
    norm: str = "layernorm"
    norm_epsilon: float = 1e-5
    channel: str | None = None
    channel_multiplier: float = 4.0
    dropout: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Any = nn.initializers.normal(0.02)
    out_kernel_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: State | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], State | None]:
        def norm(name):
            make = NORMS[self.norm]
            return make(
                epsilon=self.norm_epsilon,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        y, state = self.mixer(norm("norm1")(x), state, segment_ids=segment_ids)
        self.sow("intermediates", "mixer_out", y)
        x = x + drop(y).astype(x.dtype)
        if self.channel is not None:
            y = norm("norm2")(x)
            if self.channel != "identity":
                y = CHANNEL_MIXERS[self.channel](
                    self.d_model,
                    multiplier=self.channel_multiplier,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    kernel_init=self.kernel_init,
                    out_kernel_init=self.out_kernel_init,
                    name="channel",
                )(y)
            self.sow("intermediates", "channel_out", y)
            x = x + drop(y).astype(x.dtype)
        return x, state
