"""Queries, keys and values per head and the way back: what softmax attention and its sliding window share."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxmodels.dense import Dense
from jaxmodels.mixers import segments
from jaxmodels.mixers.rotary import rotate


def head_shape(mixer: nn.Module) -> tuple[int, int, int]:
    """Query heads, key/value heads, head width, from the fields of a mixer; ValueError when they do not divide."""
    heads, groups = mixer.num_heads, mixer.num_kv_heads or mixer.num_heads
    name = type(mixer).__name__
    if heads < 1 or mixer.d_model % heads:
        raise ValueError(f"{name}: d_model={mixer.d_model} does not divide into num_heads={heads}")
    if groups < 1 or heads % groups:
        raise ValueError(f"{name}: num_heads={heads} is no multiple of num_kv_heads={groups}")
    return heads, groups, mixer.d_model // heads


def project_qkv(
    mixer: nn.Module, x: Float[Array, "b t d"], positions: Int[Array, "b t"]
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t g k"], Float[Array, "b t g k"]]:
    """Inside a compact call: `Wqkv` ordered (3, heads, width) as in zoology, or `Wq` and `Wkv` for grouped heads; rotary."""
    heads, groups, width = head_shape(mixer)

    def project(name, parts, heads):
        y = Dense(
            parts * heads * width,
            use_bias=mixer.use_bias,
            dtype=mixer.dtype,
            param_dtype=mixer.param_dtype,
            kernel_init=mixer.kernel_init,
            name=name,
        )(x)
        return [part.reshape(*x.shape[:2], heads, width) for part in jnp.split(y, parts, axis=-1)]

    if groups == heads:
        q, k, v = project("Wqkv", 3, heads)
    else:
        (q,) = project("Wq", 1, heads)
        k, v = project("Wkv", 2, groups)
    if mixer.rotary_fraction:
        q, k = (rotate(x, positions, mixer.rotary_fraction, mixer.rotary_base) for x in (q, k))
    return q, k, v


def project_out(mixer: nn.Module, y: Float[Array, "b t h k"]) -> Float[Array, "b t d"]:
    """Inside a compact call: `out_proj`, with its bias whatever use_bias says, as in zoology."""
    return Dense(
        mixer.d_model,
        dtype=mixer.dtype,
        param_dtype=mixer.param_dtype,
        kernel_init=mixer.out_kernel_init,
        name="out_proj",
    )(y.reshape(*y.shape[:2], -1))


def dropout_arguments(mixer: nn.Module) -> dict:
    """Dropout is on iff the call has a "dropout" stream."""
    if not mixer.dropout or not mixer.has_rng("dropout"):
        return {}
    return {"dropout_rate": mixer.dropout, "dropout_key": mixer.make_rng("dropout")}


def forget(
    cache: Float[Array, "b m g k"],
    before: segments.Cursor,
    after: segments.Cursor,
) -> Float[Array, "b m g k"]:
    """The cache without what earlier segments left in the slots that the current one has not reached.

    A pass over the whole cache, so only when a row has changed its segment: a decoding step leaves it where it lies.
    """
    unused = jnp.arange(cache.shape[1]) >= after["position"][:, None]
    changed = jnp.any(before["segment"] != after["segment"])
    clear = lambda cache: jnp.where(unused[..., None, None], 0, cache)
    return jax.lax.cond(changed, clear, lambda cache: cache, cache)
