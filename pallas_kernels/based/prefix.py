"""What stands on top of the op: prefix linear attention (JRT) and bidirectional linear attention."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_kernels.based import chunked
from pallas_kernels.based.api import based
from pallas_kernels.segment_ids import check_segment_ids


def prefix_based(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    k_enc: Float[Array, "b m g f"],
    v_enc: Float[Array, "b m g v"],
    *,
    prefix_length: Int[Array, " b"],
    segment_ids: Int[Array, "b t"] | None = None,
    normalize: bool = True,
    epsilon: float = 1e-12,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b g e v1"]]:
    """Every token also reads the encoder keys and values of the whole prefix, before and after it.

        S_enc = sum_(j < prefix_length) phi(k_enc_j) [v_enc_j, 1]^T
        [num_t, den_t] = (S_enc + sum_(j <= t) phi(k_j) [v_j, 1]^T)^T phi(q_t)          y as in `based`

    Prefix linear attention, arXiv 2407.05483, section 4.2: the causal sum runs over all t tokens, the prefix included. k_enc
    and v_enc cover the first m <= t of them. It is `based` with S_enc as the initial state, so that the final state serves
    prefill and decoding by `based` alone.

    prefix_length: per row, 0 for none. Too long when concrete: ValueError; when traced: cut to m.
    segment_ids: the prefix belongs to the first segment; padding inside it contributes nothing.
    """
    b, t, m = *q.shape[:2], k_enc.shape[1]
    if m > t or k_enc.shape != (b, m, *k.shape[2:]) or v_enc.shape != (b, m, *v.shape[2:]):
        raise ValueError(
            f"k_enc {k_enc.shape}, v_enc {v_enc.shape} do not fit k {k.shape}, v {v.shape}: "
            "they are the first m <= t tokens, with the same heads and widths"
        )
    if prefix_length.shape != (b,):
        raise ValueError(f"prefix_length is {prefix_length.shape}, not {(b,)}")
    if not isinstance(prefix_length, Tracer):
        lengths = np.asarray(prefix_length)
        if (lengths < 0).any() or (lengths > m).any():
            row = int(np.argmax((lengths < 0) | (lengths > m)))
            raise ValueError(
                f"prefix_length of row {row} is {lengths[row]}; it must lie between 0 and the {m} encoder tokens"
            )
    in_prefix = jnp.arange(m) < prefix_length[:, None]
    if segment_ids is not None:
        check_segment_ids(segment_ids)
        ids = segment_ids[:, :m]
        in_prefix &= (ids > 0) & (ids == ids[:, :1])
    k_enc, v_enc = (jnp.where(in_prefix[..., None, None], x, 0) for x in (k_enc, v_enc))
    return based(
        q,
        k,
        v,
        initial_state=chunked.final_state(k_enc, v_enc, in_prefix.astype(jnp.int32)),
        segment_ids=segment_ids,
        normalize=normalize,
        epsilon=epsilon,
        implementation=implementation,
    )


def bidirectional_based(
    q: Float[Array, "b t h f"],
    k: Float[Array, "b t g f"],
    v: Float[Array, "b t g v"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    normalize: bool = True,
    epsilon: float = 1e-12,
    implementation: str | None = None,
) -> Float[Array, "b t h v"]:
    """Every token reads its whole segment: y_i = sum_j w_ij v_j / (sum_j w_ij + epsilon) over all j of the segment.

    The causal op on the sequence and on its reverse, less the token itself, which both have read. Padding is as in `based`.
    """
    b, t, h, f = q.shape
    g = k.shape[2]
    if segment_ids is not None:
        check_segment_ids(segment_ids)
        real = (segment_ids > 0)[..., None, None]
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    acc = jnp.promote_types(v.dtype, jnp.float32)
    # The denominators as one more value: only numerators can be added.
    v1 = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    call = lambda arrays, ids: based(
        *arrays, segment_ids=ids, normalize=False, implementation=implementation
    )[0].astype(acc)
    flip = lambda x: jnp.flip(x, axis=1)
    backward_ids = None
    if segment_ids is not None:
        v1 = jnp.where(real, v1, 0)
        # Still never decreasing; the padding, now in front, is a segment of its own that adds nothing to the others.
        largest = jnp.max(segment_ids, axis=1, keepdims=True)
        backward_ids = flip(jnp.where(segment_ids > 0, largest + 2 - segment_ids, 1))
    arrays = q, k, v1
    both = call(arrays, segment_ids) + flip(call(tuple(map(flip, arrays)), backward_ids))
    pairs = jnp.einsum("btgrf,btgf->btgr", q.reshape(b, t, g, h // g, f), k, precision="highest")
    own = chunked.taylor_weights(pairs.astype(acc), f)[..., None] * v1[:, :, :, None].astype(acc)
    out = both - own.reshape(both.shape)
    y, den = out[..., :-1], out[..., -1:]
    if normalize:
        den = den if segment_ids is None else jnp.where(real, den, 1)
        y = y / (den + epsilon)
    y = y if segment_ids is None else jnp.where(real, y, 0)
    return y.astype(v.dtype)
