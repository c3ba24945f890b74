"""One sequence over the devices of a mesh axis, for use inside `jax.shard_map`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.based import chunked, split
from pallas_kernels.based.api import based
from pallas_kernels.linear_attention.varying import varying_like


def based_sharded(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    *,
    axis_name: str,
    initial_state: Float[Array, "b g e v1"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    normalize: bool = True,
    epsilon: float = 1e-12,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b g e v1"]]:
    """`based` for this device's piece of the sequence; pieces follow each other along the mesh axis `axis_name`.

    y is the piece's; the final state is that of the whole sequence, the same on every device, as the initial state must be.
    Forward communicates one state per device (an all-gather; 40 KB a head at f = 16, v = 64), whatever the length, and
    backward the same. Exact, with gradients through the collectives for every input. Segment ids are as for one device:
    never decreasing over the whole sequence. The errors are those of `based`.
    """
    real = None if segment_ids is None else (segment_ids > 0)[..., None, None]
    clear = lambda x: x if real is None else jnp.where(real, x, 0)
    q, k, v = (varying_like(clear(x), (q, k, v)) for x in (q, k, v))
    added = chunked.final_state(k, v, segment_ids)
    everyones = jnp.moveaxis(jax.lax.all_gather(added, axis_name), 0, 1)
    if segment_ids is None:
        first = last = jnp.ones((q.shape[0], everyones.shape[1]), jnp.int32)
    else:
        ends = jnp.stack([segment_ids[:, 0], jnp.max(segment_ids, axis=1)]).astype(jnp.int32)
        first, last = jnp.moveaxis(jax.lax.all_gather(ends, axis_name), 0, -1)
    chain = split.links(first, last)
    state = None if initial_state is None else initial_state.astype(added.dtype)
    starts, _ = split.combine(chain, everyones, state)
    here = jax.lax.axis_index(axis_name)
    start = jax.lax.dynamic_index_in_dim(starts, here, axis=1, keepdims=False)
    y, _ = based(
        q,
        k,
        v,
        initial_state=start,
        segment_ids=segment_ids,
        normalize=normalize,
        epsilon=epsilon,
        implementation=implementation,
    )
    return y, _final(chain, added, state, here, axis_name)


def _final(chain: split.Links, added, state, here, axis_name):
    """The final state as a sum over devices, which is the same on all of them in the eyes of shard_map too."""
    mine = jax.lax.dynamic_index_in_dim(chain.adds[:, -1], here, axis=1, keepdims=False)
    part = jnp.where(mine[:, None, None, None], added, 0)
    if state is not None:
        kept = chain.initial[:, -1] & (here == 0)
        part = part + jnp.where(kept[:, None, None, None], state, 0)
    return jax.lax.psum(part, axis_name)
