"""One token at a time: on a TPU the compiler's own fusion is the kernel.

    S' = S + phi(k) [v; 1]^T,    [num; den] = S'^T phi(q)

XLA makes one fusion of both lines, which reads S once and writes S' once, in place where the caller donates it; a gate
(tests/gates/kernels_tpu.py) compiles it and counts the bytes. A Mosaic kernel would have to take S row by row: 153 rows of
65 columns stand in HBM as 160 x 128, 168 MB for 2,048 heads where the layout that XLA picks (rows of the batch on lanes)
has 81. So there is none.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.based.feature_map import taylor_features


def decode(
    q: Float[Array, "b 1 h f"],
    k: Float[Array, "b 1 g f"],
    v: Float[Array, "b 1 g v"],
    state: Float[Array, "b g e v1"],
    ids: Int[Array, "b 1"] | None,
    *,
    normalize: bool,
    epsilon: float,
) -> tuple[Float[Array, "b 1 h v"], Float[Array, "b 1 h"], Float[Array, "b g e v1"]]:
    """y, den and the state after the token; where its id is 0, y = 0 and the state is what it was.

    Rows may stand at different positions: the state knows no position. Products are sums in float32, never on the matrix
    unit: a matrix-vector product is bound by memory, and rounds nothing this way.
    """
    b, _, h, _ = q.shape
    g = k.shape[2]
    real = None if ids is None else (ids > 0)[..., None]
    phi_q, phi_k = (taylor_features(x[:, 0].astype(state.dtype)) for x in (q, k))
    v1 = jnp.concatenate([v[:, 0].astype(state.dtype), jnp.ones((b, g, 1), state.dtype)], axis=-1)
    if real is not None:
        v1 = jnp.where(real, v1, 0)
    state = state + phi_k[..., :, None] * v1[..., None, :]
    # One reduction per query head of the group: with a broadcast over them XLA would keep S' apart for each.
    queries = jnp.moveaxis(phi_q.reshape(b, g, h // g, -1), 2, 0)
    out = jnp.stack([jnp.sum(phi[..., None] * state, axis=-2) for phi in queries], axis=2)
    out = out.reshape(b, h, -1)
    num, den = out[..., :-1], out[..., -1]
    if normalize:
        divisor = den + epsilon
        if real is not None:
            divisor = jnp.where(real[..., 0], divisor, 1)
        num = num / divisor[..., None]
    if real is not None:
        num = jnp.where(real, num, 0)
    return num[:, None].astype(v.dtype), den[:, None], state
