"""Softmax attention, whose state grows with the length."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxmodels.mixers import heads, segments
from jaxmodels.typing import Dtype, Initializer, State
from pallas_kernels.attention import attend_to_cache, attention


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


# From this length on, a call on an empty cache (a prefill) is worth a program of its own, which does not read the cache.
PREFILL = 128


def _with_cache(q, k, v, state, where, options):
    """Attention to the cache and the new tokens, and the cache after them."""
    after = {"cursor": where.cursor}
    for name, new in (("k", k), ("v", v)):
        cache = segments.write_tokens(state[name], new, where.positions, where.in_last_segment)
        if where.segment_ids is not None:
            cache = heads.forget(cache, state["cursor"], where.cursor)
        after[name] = cache
    if q.shape[1] == 1:
        # The token is in the cache already: attending there copies nothing.
        visible = jnp.arange(after["k"].shape[1]) <= where.history[:, None]
        return attend_to_cache(q, after["k"], after["v"], visible, **options), after

    b, t = q.shape[:2]
    ids = where.segment_ids
    if ids is None:
        ids = jnp.ones((b, t), jnp.int32)

    def joined(q, k, v, cached_k, cached_v):
        k, v = (
            jnp.concatenate([cached.astype(new.dtype), new], axis=1)
            for cached, new in ((cached_k, k), (cached_v, v))
        )
        cached = jnp.arange(cached_k.shape[1]) < where.history[:, None]
        k_ids = jnp.concatenate([jnp.where(cached, ids[:, :1], 0), ids], axis=1)
        return attention(q, k, v, q_segment_ids=ids, k_segment_ids=k_ids, **options)

    def alone(q, k, v, *_):
        return attention(q, k, v, q_segment_ids=ids, k_segment_ids=ids, **options)

    operands = (q, k, v, state["k"], state["v"])
    if t < PREFILL:
        return joined(*operands), after
    return jax.lax.cond(jnp.any(where.history > 0), joined, alone, *operands), after


def _check_room(where: segments.Layout, max_len: int) -> None:
    """ValueError when concrete positions pass the end of the cache."""
    position = where.cursor["position"]
    if isinstance(position, Tracer):
        return
    longest = int(np.max(np.asarray(position), initial=0))
    if longest > max_len:
        raise ValueError(
            f"Attention: {longest} tokens do not fit a cache of max_len={max_len}; give init_state a larger max_len"
        )
