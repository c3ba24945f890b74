"""Softmax attention to the last few tokens, with a ring buffer for a state."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxmodels.mixers import heads, segments
from jaxmodels.typing import Dtype, Initializer, State
from pallas_kernels.attention import attend_to_cache
from pallas_kernels.sliding_window import sliding_window


class SlidingWindow(nn.Module):
    """As `Attention`, but y_t sees only the last `window` tokens, t itself included: t - window < j <= t.

    `window` counts keys. Others count differently: the "256" of the BASED language-model configs (HazyResearch) is a
    window of 128 tokens before and the token itself, window = 129 here; zoology's block_size w keeps w + 1 keys,
    window = w + 1, while its accounting, and its plots, count 2 w d.

    The state is a ring buffer of `window` slots of keys (after rotary) and values, whatever the length; the token at
    position p of the current segment lies in slot p mod window.

    Attributes:
        d_model: model width; a head is d_model / num_heads wide.
        window: keys that a token sees, itself included.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (default: num_heads).
        rotary_fraction: part of each head that is rotated by the position in the segment; 0 for none, 1 for all.
        rotary_base: the longest wavelength of rotary is 2 pi times this.
        dropout: rate on the attention weights, on iff the call has a "dropout" rng.
        use_bias: of queries, keys and values; out_proj always has one.
    """

    d_model: int
    window: int = 64
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
        """An empty ring; max_len does not matter."""
        _, groups, width = heads.head_shape(self)
        shape = (batch_size, self.window, groups, width)
        return {
            "cursor": segments.init_cursor(batch_size),
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
        }

    def legacy_state_elements(self, length: int) -> int:
        """Zoology's count, 2 window d, with the width of the key/value heads for d."""
        _, groups, width = heads.head_shape(self)
        return 2 * self.window * groups * width

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
            ids = {"q_segment_ids": segment_ids, "k_segment_ids": segment_ids}
            y = sliding_window(q, k, v, window=self.window, **ids, **options)
        else:
            y, state = _with_ring(q, k, v, state, where, options)
        return segments.zero_padding(heads.project_out(self, y), where), state


def _with_ring(q, k, v, state, where, options):
    """Attention to the ring and the new tokens, and the ring after them."""
    window, position = state["k"].shape[1], where.cursor["position"][:, None]
    last = where.in_last_segment & (where.positions >= position - window)
    after = {"cursor": where.cursor}
    for name, new in (("k", k), ("v", v)):
        ring = segments.write_tokens(state[name], new, where.positions % window, last)
        if where.segment_ids is not None:
            ring = heads.forget(ring, state["cursor"], where.cursor)
        after[name] = ring
    if q.shape[1] == 1:
        # The ring holds the token and all it sees, in some order, which softmax does not mind.
        visible = jnp.arange(window) <= where.history[:, None]
        return attend_to_cache(q, after["k"], after["v"], visible, **options), after

    ids = where.segment_ids
    if ids is None:
        ids = jnp.ones(q.shape[:2], jnp.int32)
    at = where.history[:, None] + jnp.arange(1 - window, 0)  # the oldest that a new token sees
    slots = (at % window)[..., None, None]
    k, v = (
        jnp.concatenate([jnp.take_along_axis(ring, slots, 1).astype(new.dtype), new], axis=1)
        for ring, new in ((state["k"], k), (state["v"], v))
    )
    k_ids = jnp.concatenate([jnp.where(at >= 0, ids[:, :1], 0), ids], axis=1)
    y = sliding_window(q, k, v, window=window, q_segment_ids=ids, k_segment_ids=k_ids, **options)
    return y, after
