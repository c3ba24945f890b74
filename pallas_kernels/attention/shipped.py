"""The fused attention kernels that JAX ships, behind our contract: splash attention on TPU, cuDNN's on GPU.

`splash` and `cudnn` compute the op of api.py (window None) or of `pallas_kernels.sliding_window` for as many keys as
queries, linear memory, gradients included. `refuses` says why one cannot take a call; then the XLA forms do.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.inputs import Inputs

NAMES = ("splash", "cudnn")
SPLASH_BLOCK = 512  # queries and keys of a block; the kernel wants multiples of 128
NARROW = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def refuses(name: str, inputs: Inputs, rate: float) -> str | None:
    """Why the kernel `name` cannot run this call, None where it can."""
    q, k, v, q_ids, *_ = inputs
    t, s = q.shape[1], k.shape[1]
    if rate > 0:
        return "it has no dropout that agrees with the other implementations"
    if t != s:
        return f"it needs as many keys as queries, not {s} and {t}"
    if t < 128:
        return f"{t} tokens are too few for its blocks of 128"
    if name == "splash":
        if q.dtype != jnp.bfloat16 or v.dtype != jnp.bfloat16:
            return f"its products round to bfloat16, which {q.dtype} operands do not ask for"
        if q.shape[3] > 256 or v.shape[3] > 256:
            return f"heads of {q.shape[3]} and {v.shape[3]} are wider than 256"
        return None
    if q.dtype not in NARROW or v.dtype != q.dtype:
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q_ids is not None:
        return "it has no segments"
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 128:
        return f"heads must be equally wide, a multiple of 8 and at most 128, not {q.shape[3]} and {v.shape[3]}"
    return None if _has_cudnn() else "this process has no cuDNN"


def take_over(
    inputs: Inputs,
    rate: float,
    window: int | None,
    otherwise: Callable[[Inputs], Float[Array, "b t h v"]],
) -> Float[Array, "b t h v"]:
    """The shipped kernel of the platform that the program is compiled for, `otherwise` where it refuses.

    A TPU is found out when the program is lowered, so that compiling for one from elsewhere takes its kernel; cuDNN must be
    there to be asked, so the process must run on the GPU.
    """
    if refuses("cudnn", inputs, rate) is None:
        return cudnn(inputs, window)
    if refuses("splash", inputs, rate) is not None:
        return otherwise(inputs)
    arrays, scale = inputs[:-1], inputs.scale
    whole = lambda form: lambda *arrays: form(Inputs._make((*arrays, scale)))
    return jax.lax.platform_dependent(
        *arrays, tpu=whole(lambda i: splash(i, window)), default=whole(otherwise)
    )


def force(name: str, inputs: Inputs, rate: float, window: int | None) -> Float[Array, "b t h v"]:
    """The kernel that was asked for by name. Raises ValueError where it cannot run."""
    reason = refuses(name, inputs, rate)
    if reason is not None:
        raise ValueError(f"implementation {name!r} cannot run this call: {reason}")
    return splash(inputs, window) if name == "splash" else cudnn(inputs, window)


def splash(inputs: Inputs, window: int | None, interpret: bool = False) -> Float[Array, "b t h v"]:
    """Splash attention: only the blocks that the mask touches are visited. interpret: on a CPU, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    q, k, v, ids, _, _, scale = inputs
    t, h = q.shape[1:3]
    padded = -(-t // SPLASH_BLOCK) * SPLASH_BLOCK if t > SPLASH_BLOCK else -(-t // 128) * 128
    kernel = _splash_kernel(padded, h, window, interpret)
    if ids is None and padded > t:
        ids = jnp.ones(q.shape[:2], jnp.int32)

    def heads_first(x):
        x = jnp.pad(x, [(0, 0), (0, padded - t), (0, 0), (0, 0)])
        return jnp.swapaxes(x, 1, 2)

    q = q * jnp.asarray(scale, q.dtype)
    segments = None
    if ids is not None:
        ids = jnp.pad(ids, [(0, 0), (0, padded - t)])
        segments = kernels.SegmentIds(ids, ids)
    y = jax.vmap(kernel)(*(heads_first(x) for x in (q, k, v)), segments)
    return jnp.swapaxes(y, 1, 2)[:, :t]


def cudnn(inputs: Inputs, window: int | None) -> Float[Array, "b t h v"]:
    """cuDNN's flash attention through `jax.nn.dot_product_attention`."""
    q, k, v, _, _, _, scale = inputs
    reach = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=reach, implementation="cudnn"
    )


@functools.cache
def _splash_kernel(t: int, heads: int, window: int | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = min(SPLASH_BLOCK, t)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    if window is None:
        mask = masks.CausalMask((t, t))
    else:
        mask = masks.LocalMask((t, t), window_size=(window - 1, 0), offset=0)
    many = masks.MultiHeadMask([mask] * heads)
    with jax.ensure_compile_time_eval():
        return kernels.make_splash_mha(
            many, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )


@functools.cache
def _has_cudnn() -> bool:
    """Whether the default device is one that cuDNN's kernels run on: Ampere or newer, with the library loaded."""
    if jax.default_backend() != "gpu":
        return False
    probe = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(
            lambda x: jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn"),
            probe,
        )
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return float(jax.devices()[0].compute_capability) >= 8.0
