"""Softmax attention, whose state grows with the length."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxmodels.mixers import heads, segments
from jaxmodels.typing import Dtype, Initializer, State
from pallas_kernels.attention import attention


class Attention(nn.Module):
    """y_t = W_o sum_(j<=t) softmax_j(q_t . k_j / sqrt(head width)) v_j + b_o over the tokens j of t's segment.

    Sources: Vaswani et al., arXiv 1706.03762; grouped heads, arXiv 2305.13245; parameter names and bias of zoology's MHA.

    The state is a cache of keys (after rotary) and values. It GROWS WITH THE LENGTH: `init_state(batch, max_len)` holds
    max_len tokens of the current segment, 2 max_len num_kv_heads (head width) numbers. A call that would pass max_len
    raises ValueError when its positions are concrete; under jit the tokens past it are not stored, and later outputs are
    not those of a longer cache.

    Attributes:
        d_model: model width; a head is d_model / num_heads wide.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (default: num_heads).
        rotary_fraction: part of each head that is rotated by the position in the segment; 0 for none, 1 for all.
        rotary_base: the longest wavelength of rotary is 2 pi times this.
        dropout: rate on the attention weights, on iff the call has a "dropout" rng.
        use_bias: of queries, keys and values; out_proj always has one.
    """

    d_model: int
    num_heads: int = 1
    num_kv_heads: int | None = None
    rotary_fraction: float = 0.0
    rotary_base: float = 10_000.0
    dropout: float = 0.0
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_kernel_init: Initializer = nn.initializers.normal(0.02)

    def init_state(self, batch_size: int, max_len: int, dtype: Dtype = jnp.float32) -> State:
        """An empty cache of max_len slots; slot i holds the token at position i of the current segment."""
        _, groups, width = heads.head_shape(self)
        shape = (batch_size, max_len, groups, width)
        return {
            "cursor": segments.init_cursor(batch_size),
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
        }

    def legacy_state_elements(self, length: int) -> int:
        """Zoology's count, 2 d length, with the width of the key/value heads for d."""
        _, groups, width = heads.head_shape(self)
        return 2 * groups * width * length

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: State | None = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], State | None]:
        b, t, _ = x.shape
        where = segments.layout(segment_ids, state and state["cursor"], b, t)
        x = segments.zero_padding(x, where)
        q, k, v = heads.project_qkv(self, x, where.positions)
        options = heads.dropout_arguments(self)
        if state is None:
            y = attention(q, k, v, q_segment_ids=segment_ids, k_segment_ids=segment_ids, **options)
        else:
            _check_room(where, state["k"].shape[1])
            y, state = _with_cache(q, k, v, state, where, options)
        return segments.zero_padding(heads.project_out(self, y), where), state


def _with_cache(q, k, v, state, where, options):
    """Attention to the cache and the new tokens, and the cache after them."""
    after = {
        "cursor": where.cursor,
        "k": _store(state["k"], k, where),
        "v": _store(state["v"], v, where),
    }
    b, t = q.shape[:2]
    slots = jnp.arange(state["k"].shape[1])
    ids = where.segment_ids
    if ids is None:
        ids = jnp.ones((b, t), jnp.int32)
    if t == 1:
        # The token is in the cache already: attending there copies nothing.
        cached = (slots <= where.history[:, None]) & (ids > 0)
        k, v, k_ids = after["k"], after["v"], jnp.where(cached, ids, 0)
    else:
        cached = slots < where.history[:, None]
        k = jnp.concatenate([state["k"].astype(k.dtype), k], axis=1)
        v = jnp.concatenate([state["v"].astype(v.dtype), v], axis=1)
        k_ids = jnp.concatenate([jnp.where(cached, ids[:, :1], 0), ids], axis=1)
    y = attention(q, k, v, q_segment_ids=ids, k_segment_ids=k_ids, **options)
    return y, after


def _store(cache, values, where):
    """The cache with the tokens of the last segment in it, and nothing of an earlier one."""
    cache = segments.write_tokens(cache, values, where.positions, where.in_last_segment)
    if where.segment_ids is None:
        return cache
    used = jnp.arange(cache.shape[1]) < where.cursor["position"][:, None]
    return jnp.where(used[..., None, None], cache, 0)


def _check_room(where: segments.Layout, max_len: int) -> None:
    """ValueError when concrete positions pass the end of the cache."""
    position = where.cursor["position"]
    if isinstance(position, jax.core.Tracer):
        return
    longest = int(np.max(np.asarray(position), initial=0))
    if longest > max_len:
        raise ValueError(
            f"Attention: {longest} tokens do not fit a cache of max_len={max_len}; give init_state a larger max_len"
        )
