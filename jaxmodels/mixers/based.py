"""BASED linear attention: the second-order Taylor expansion of softmax attention, with a state of fixed size."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

import pallas_kernels.based as op
from jaxmodels.dense import Dense
from jaxmodels.mixers import segments
from jaxmodels.typing import Dtype, Initializer, State


class Based(nn.Module):
    """y_t = sum_(j<=t) phi(q_t).phi(k_j) v_j / sum_(j<=t) phi(q_t).phi(k_j), phi(q).phi(k) = 1 + s + s^2/2, s = q.k/sqrt(f).

    Source: arXiv 2402.18668, section 4. No positions, no biases. The state is the packed sum of phi(k) [v, 1]^T per
    key/value head, (1 + f + f(f+1)/2) x (head width + 1) numbers, whatever the length.

    Attributes:
        d_model: model width.
        feature_dim: f, width of queries and keys per head (any; 16 in the paper).
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (default: num_heads).
        head_dim: value width per head (default: d_model / num_heads).
        epsilon: added to the normaliser; 1e-12 as published.
        out_range: deviation of the initial out_proj, where it is not out_kernel_init's. Zoology rescales the output
            projections of its mixers by 1/sqrt(2 layers), but not this one: its MQAR figures have 0.02 here.
        implementation: of `pallas_kernels.based`; None picks by length.
    """

    d_model: int
    feature_dim: int = 16
    num_heads: int = 1
    num_kv_heads: int | None = None
    head_dim: int | None = None
    epsilon: float = 1e-12
    out_range: float | None = None
    implementation: str | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_kernel_init: Initializer = nn.initializers.normal(0.02)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, value width per head."""
        groups = self.num_kv_heads or self.num_heads
        if self.num_heads % groups:
            raise ValueError(
                f"based: num_heads={self.num_heads} is no multiple of num_kv_heads={groups}"
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"based: d_model={self.d_model} does not divide into num_heads={self.num_heads}; set head_dim"
            )
        return self.num_heads, groups, self.head_dim or self.d_model // self.num_heads

    def init_state(self, batch_size: int, max_len: int, dtype: Dtype = jnp.float32) -> State:
        """The empty state; max_len does not matter."""
        _, groups, width = self._shape
        shape = (batch_size, groups, op.expanded_width(self.feature_dim), width + 1)
        return {
            "cursor": segments.init_cursor(batch_size),
            "sums": jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)),
        }

    def legacy_state_elements(self, length: int) -> int:
        """Zoology's count: e (head width + 1) per key/value head."""
        _, groups, width = self._shape
        return groups * op.expanded_width(self.feature_dim) * (width + 1)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: State | None = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], State | None]:
        heads, groups, width = self._shape
        b, t, _ = x.shape
        where = segments.layout(segment_ids, state and state["cursor"], b, t)
        x = segments.zero_padding(x, where)

        def project(name, n, per_head):
            dense = Dense(
                n * per_head,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                name=name,
            )
            return dense(x).reshape(b, t, n, per_head)

        y, sums = op.based(
            project("proj_q", heads, self.feature_dim),
            project("proj_k", groups, self.feature_dim),
            project("proj_v", groups, width),
            initial_state=state and segments.keep_if_continues(state["sums"], where),
            segment_ids=segment_ids,
            epsilon=self.epsilon,
            implementation=self.implementation,
        )
        y = Dense(
            self.d_model,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.out_kernel_init
            if self.out_range is None
            else nn.initializers.normal(self.out_range),
            name="out_proj",
        )(y.reshape(b, t, heads * width))
        return y, state and {"cursor": where.cursor, "sums": sums.astype(state["sums"].dtype)}
