"""The attention kernels that JAX ships, behind our contract: splash in its interpreter, against sums written out in float64.

cuDNN needs a GPU; here only its refusals can be tested.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, shipped
from pallas_kernels.attention.inputs import prepare
from pallas_kernels.sliding_window import sliding_window

SHAPES = {"plain": (1, 200, 2, 2, 16), "grouped": (2, 150, 4, 2, 64)}


def arguments(shape, dtype=np.float32):
    b, t, h, g, width = shape
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(b, t, n, width)).astype(dtype) for n in (h, g, g))


def segments(b, t):
    ids = np.ones((b, t), np.int32)
    ids[:, t // 3 :] = 2
    ids[0, -20:] = 0
    return ids


def expected(q, k, v, ids, window):
    """Softmax over the visible keys, row by row."""
    b, t, h, width = q.shape
    repeat = h // k.shape[2]
    y = np.zeros((b, t, h, v.shape[-1]))
    at = np.arange(t)
    visible = (at[:, None] >= at) & (at[:, None] - at < (window or t))
    for row in range(b):
        seen = visible & (ids[row][:, None] == ids[row]) & (ids[row] > 0)
        for head in range(h):
            s = q[row, :, head] @ k[row, :, head // repeat].T / np.sqrt(width)
            w = np.where(seen, np.exp(s - s.max()), 0)
            total = w.sum(1, keepdims=True)
            y[row, :, head] = (w @ v[row, :, head // repeat]) / np.maximum(total, 1e-300)
            y[row, ids[row] == 0, head] = 0
    return y


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_splash_against_written_out_sums(name, packed, window):
    q, k, v = arguments(SHAPES[name])
    ids = segments(*q.shape[:2]) if packed else None
    given = None if ids is None else jnp.asarray(ids)
    whole = ids if packed else np.ones(q.shape[:2], np.int32)

    def total(q, k, v):
        inputs = prepare(q, k, v, given, given, None, 0.0, None)
        y = shipped.splash(inputs, window, interpret=True)
        y = jnp.where((jnp.asarray(whole) > 0)[..., None, None], y, 0)
        return jnp.sum(y * weights), y

    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    run = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    (_, y), gradients = jax.jit(run)(q, k, v)
    exact = [x.astype(np.float64) for x in (q, k, v)]
    np.testing.assert_allclose(y, expected(*exact, whole, window), atol=2e-5)
    form = attention if window is None else lambda *a, **o: sliding_window(*a, window=window, **o)

    def reference(q, k, v):
        ids = {} if given is None else {"q_segment_ids": given, "k_segment_ids": given}
        return jnp.sum(form(q, k, v, implementation="reference", **ids) * weights)

    with jax.enable_x64(True):
        wanted = jax.jit(jax.grad(reference, argnums=(0, 1, 2)))(*exact)
    for ours, theirs in zip(gradients, wanted):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def narrow(shape=(1, 256, 2, 2, 64), dtype=jnp.bfloat16):
    return [jnp.asarray(x, dtype) for x in arguments(shape)]


def test_lowered_for_a_tpu_it_is_the_kernel_and_for_a_cpu_it_is_not():
    from jax import export

    def texts(**options):
        run = jax.jit(lambda q, k, v: sliding_window(q, k, v, window=64, **options))
        return [
            export.export(run, platforms=[platform])(*narrow()).mlir_module()
            for platform in ("tpu", "cpu")
        ]

    on_tpu, on_cpu = texts()
    assert "tpu_custom_call" in on_tpu
    assert "tpu_custom_call" not in on_cpu
    assert "tpu_custom_call" not in texts(implementation="chunked")[0]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("splash", dict(dtype=jnp.float32), "round to bfloat16"),
        ("splash", dict(shape=(1, 64, 2, 2, 64)), "64 tokens are too few"),
        ("splash", dict(shape=(1, 256, 1, 1, 320)), "wider than 256"),
        ("cudnn", dict(dtype=jnp.float32), "bfloat16 and float16"),
        ("cudnn", dict(shape=(1, 256, 2, 2, 20)), "a multiple of 8"),
        ("cudnn", dict(), "no cuDNN"),
    ],
)
def test_a_forced_kernel_that_cannot_run_says_why(name, changes, message):
    for form in (attention, lambda *a, **o: sliding_window(*a, window=32, **o)):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            form(*narrow(**changes), implementation=name)


def test_dropout_history_and_packing_are_refused():
    q, k, v = narrow()
    with pytest.raises(ValueError, match="no dropout"):
        attention(q, k, v, dropout_rate=0.1, dropout_key=jax.random.key(0), implementation="splash")
    with pytest.raises(ValueError, match="as many keys as queries, not 256 and 200"):
        attention(q[:, :200], k, v, implementation="splash")
    ids = jnp.ones((1, 256), jnp.int32)
    with pytest.raises(ValueError, match="no segments"):
        attention(q, k, v, q_segment_ids=ids, k_segment_ids=ids, implementation="cudnn")
