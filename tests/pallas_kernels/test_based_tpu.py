"""The TPU kernels of `based`, in the TPU interpreter with race detection: the shared law, and what is theirs alone.

That they compile for real chips is checked by tests/gates/kernels_tpu.py.

Run: pytest tests/pallas_kernels/test_based_tpu.py
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.based import based, expanded_width, tpu, tpu_layout
from tests.pallas_kernels import based_law as law

forward = jax.jit(tpu.forward, static_argnames=("normalize", "epsilon"))
op = law.contract_op(tpu.forward, tpu.backward)

NARROW = ("f8_v80", "f16_v112", "f24_v128")  # the widths that these have, and float32 has not
LONG = {
    # Two blocks of four chunks, the last one ragged, and ids: every carried thing is carried.
    "two_blocks": law.Case(1, 1000, 1, 1, 8, 16, segments=True),
    # Three blocks of one chunk; the state goes through them untouched by ids.
    "three_blocks": law.Case(1, 300, 2, 1, 16, 64),
}


@pytest.fixture(autouse=True)
def interpreter(request):
    if "compiled" in request.node.name:  # for a chip that is not there
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


@pytest.mark.parametrize("name", [name for name in law.CASES if name not in ("no_state", *NARROW)])
def test_float32_numbers(name):
    law.check_numbers(op, law.CASES[name], jnp.float32, law.FLOAT32)


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_numbers(name):
    law.check_numbers(op, law.CASES[name], jnp.bfloat16, law.BFLOAT16)


@pytest.mark.parametrize("name", LONG)
def test_states_are_carried_from_block_to_block(name):
    law.check_numbers(op, LONG[name], jnp.float32, law.FLOAT32)


def test_heads_in_loops(monkeypatch):
    """Two blocks of heads, a loop over key/value heads, and one over the query heads of each, whose sums are carried."""
    monkeypatch.setattr(tpu_layout, "TOGETHER", 1)
    monkeypatch.setattr(tpu_layout, "HEADS", 6)
    case = law.Case(1, 40, 12, 4, 8, 16, segments=True)
    given = law.cast(law.arguments(case), jnp.float32)
    plan = tpu_layout.make_plan(*given[:3], given.ids)
    assert plan.grid == (1, 2, 1)
    assert (plan.groups, plan.groups_together, plan.shared, plan.members_together) == (2, 1, 3, 1)
    law.check_numbers(op, case, jnp.float32, law.FLOAT32)


def test_reruns_are_bitwise_equal():
    law.check_reruns(op, law.CASES["paper"], jnp.float32)


def test_gradients_inside_a_scan():
    """vmap and checkpoint are compiled by the gates: the interpreter knows no mapped grid, and its effects no remat."""
    case = law.Case(1, 20, 1, 1, 8, 16, segments=True)
    given = [law.cast(law.arguments(case, seed), jnp.float32) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *given)
    step = lambda _, one: (None, law._results(op, one, True, 1e-12))
    _, actual = jax.jit(lambda xs: jax.lax.scan(step, None, xs))(stacked)
    for i, one in enumerate(given):
        for what, a, w in zip(law.Results._fields, actual, law.exact(law.in_float64(one))):
            law.near(a[i], w, law.FLOAT32, what)


def test_after_a_prefill_one_token_is_decoded():
    case = law.CASES["no_state"]
    law.check_cuts(op, case, jnp.float32, law.FLOAT32, case.t - 1)


def test_a_row_of_padding_leaves_the_state_alone():
    case = law.Case(2, 9, 1, 1, 8, 16)
    given = law.cast(law.arguments(case), jnp.float32)
    ids = jnp.zeros((2, 9), jnp.int32).at[1].set(3)
    zeroed = [jnp.where((ids > 0)[..., None, None], x, 0) for x in given[:3]]
    y, den, state = forward(*zeroed, given.state, ids, normalize=True, epsilon=1e-12)
    law.near(state[0], given.state[0], 1e-6)
    assert not y[0].any()
    assert np.isfinite(den).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decoding_at_different_positions(dtype):
    """Rows whose states have seen different numbers of tokens take one more; one row takes padding."""
    case = law.Case(3, 1, 4, 2, 16, 64)
    given = law.cast(law.arguments(case), dtype)
    ids = jnp.asarray([[2], [0], [7]], jnp.int32)
    grown = jnp.asarray([1.0, 2.0, 9.0])[:, None, None, None] * given.state
    given = given._replace(ids=ids, state=grown)
    wanted = law.exact(law.in_float64(given))
    real = (ids > 0)[..., None, None]
    q, k, v = (jnp.where(real, x, 0) for x in given[:3])
    y, _, state = forward(q, k, v, given.state, ids, normalize=True, epsilon=1e-12)
    # In bfloat16 y is rounded, and nothing before it.
    law.near(y, wanted.y, law.FLOAT32 if dtype == jnp.float32 else 2**-8)
    law.near(state, wanted.state, law.FLOAT32)


@pytest.mark.parametrize("f", [3, 12, 16])
def test_states_go_to_the_aligned_layout_and_back(f):
    rng = np.random.default_rng(f)
    state = jnp.asarray(rng.normal(size=(1, 2, expanded_width(f), 6)), jnp.float32)
    aligned = jax.jit(tpu_layout.align_state, static_argnums=1)(state, f)
    packed = jax.jit(tpu_layout.pack_aligned, static_argnums=(1, 2))(aligned, f, 5)
    law.near(packed, np.asarray(state, np.float64), 1e-6)
    # An isometry: cotangents convert as states do.
    law.near(jnp.sum(aligned**2), np.sum(np.asarray(state, np.float64) ** 2), 1e-5)


def test_compiled_for_a_tpu_the_op_takes_the_kernel():
    q, v = jnp.zeros((1, 640, 2, 16), jnp.bfloat16), jnp.zeros((1, 640, 2, 64), jnp.bfloat16)
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
        f = lambda q, k, v: jnp.sum(based(q, k, v)[0].astype(jnp.float32))
        traced = jax.jit(jax.grad(f, argnums=(0, 1, 2))).trace(q, q, v)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for name in ("based_forward", "based_backward_q", "based_backward_kv"):
        assert name in text
    assert text.count("tpu_custom_call") == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(f=40), "f=40 is wider than 32"),
        (dict(v=160), "v=160 is wider than 128"),
        (dict(dtype=jnp.float16), "q, k and v are float16"),
        (dict(other=jnp.float32), "bfloat16, float32"),
        (dict(h=512, g=1), "512 query heads on 1 key/value heads .* MiB of VMEM"),
        (dict(), None),
    ],
)
def test_what_is_not_taken_is_said_in_words(change, reason):
    given = dict(f=16, v=64, h=4, g=4, dtype=jnp.bfloat16) | change
    f, v, h, g = (given[x] for x in ("f", "v", "h", "g"))
    q, k = (jnp.zeros((1, 512, n, f), given["dtype"]) for n in (h, g))
    said = tpu.supports(q, k, jnp.zeros((1, 512, g, v), given.get("other", given["dtype"])))
    assert said == reason if reason is None else re.search(reason, said), said


def test_x64_is_refused():
    q = jnp.zeros((1, 4, 1, 8), jnp.float32)
    assert tpu.supports(q, q, q) is None
    with jax.enable_x64(True):
        assert "x64" in tpu.supports(q, q, q)
