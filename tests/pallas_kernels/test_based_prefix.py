"""Prefix linear attention, bidirectional linear attention and chunked prefill, on top of `pallas_kernels.based`.

Run: pytest tests/pallas_kernels/test_based_prefix.py
"""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.based import based, bidirectional_based, chunked, prefix_based
from tests.pallas_kernels import based_law as law

FORMS = ("quadratic", "chunked")
EPSILON = 1e-12  # the default of the ops
IDS = np.array([[1] * 4 + [3] * 9 + [0] * 4, [2] * 17], np.int32)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 8)


def weights(q, k):
    """1 + s + s^2/2 of every pair, [b, h, i, j], for one key head per query head."""
    s = np.einsum("bihf,bjhf->bhij", q, k) / np.sqrt(q.shape[-1])
    return 1 + s + s**2 / 2


def prefix_by_hand(q, k, v, k_enc, v_enc, lengths, ids=None):
    """num = sum_(j<=i) w_ij v_j + sum_(j<M) w^enc_ij v^enc_j; den the same of ones (JRT, section 4.2)."""
    b, t, m = *q.shape[:2], k_enc.shape[1]
    ids = np.ones((b, t), int) if ids is None else ids
    causal = np.tri(t, dtype=bool) & (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] > 0)
    first = ids == ids[:, :1]
    encoder = (np.arange(m) < lengths[:, None]) & first[:, :m] & (ids[:, :m] > 0)
    encoder = encoder[:, None, :] & (first & (ids > 0))[:, :, None]
    w = weights(q, k) * causal[:, None]
    w_enc = weights(q, k_enc) * encoder[:, None]
    num = np.einsum("bhij,bjhv->bihv", w, v) + np.einsum("bhij,bjhv->bihv", w_enc, v_enc)
    den = np.moveaxis(w.sum(-1) + w_enc.sum(-1), 1, 2)[..., None]
    return np.where((ids > 0)[..., None, None], num / (np.where(den > 0, den, 1) + EPSILON), 0)


def bidirectional_by_hand(q, k, v, ids=None, normalize=True):
    b, t = q.shape[:2]
    ids = np.ones((b, t), int) if ids is None else ids
    seen = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] > 0)
    w = weights(q, k) * seen[:, None]
    den = np.moveaxis(w.sum(-1), 1, 2)[..., None]
    y = np.einsum("bhij,bjhv->bihv", w, v)
    return y / (np.where(den > 0, den, 1) + EPSILON) if normalize else y


def arrays(t=17, m=11, heads=2):
    given = law.arguments(law.Case(2, t, heads, heads, 4, 3))
    other = law.arguments(law.Case(2, m, heads, heads, 4, 3), seed=5)
    return given.q, given.k, given.v, other.k, other.v


def directional(function, args, seed=0):
    """d sum(function(*args) c) along a random direction, by central differences; with c, and the direction."""
    rng = np.random.default_rng(seed)
    c = rng.normal(size=function(*args).shape)
    direction = [rng.normal(size=x.shape) for x in args]
    step = 1e-5
    ahead, behind = (
        np.sum(c * function(*(x + sign * step * d for x, d in zip(args, direction))))
        for sign in (1, -1)
    )
    return c, direction, (ahead - behind) / (2 * step)


def check_gradient(op, by_hand, args):
    """Relative to 1e-6: what central differences in float64 leave."""
    c, direction, wanted = directional(by_hand, args)
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(op(*a) * c), tuple(range(len(args)))))(*args)
    actual = sum(np.sum(np.asarray(g) * d) for g, d in zip(gradient, direction))
    np.testing.assert_allclose(actual, wanted, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", [None, IDS])
def test_prefix_is_read_whole_by_every_token(ids, form):
    args, lengths = arrays(), np.array([0, 9] if ids is None else [3, 11])
    with jax.enable_x64(True):
        op = lambda *a: prefix_based(
            *a,
            prefix_length=jnp.asarray(lengths),
            segment_ids=None if ids is None else jnp.asarray(ids),
            implementation=form,
        )[0]
        by_hand = lambda *a: prefix_by_hand(*a, lengths, ids)
        law.near(jax.jit(op)(*args), by_hand(*args), 1e-12)
        check_gradient(op, by_hand, args)


def test_prefix_ends_where_the_padding_begins_and_segments_keep_theirs():
    """A prefix length past the first segment reads no token of the second."""
    args, lengths = arrays(), np.array([11, 11])
    with jax.enable_x64(True):
        q, k, v, k_enc, v_enc = map(jnp.asarray, args)
        k_enc = k_enc.at[0, 4:].set(jnp.nan)
        y, _ = prefix_based(
            q, k, v, k_enc, v_enc, prefix_length=jnp.asarray(lengths), segment_ids=jnp.asarray(IDS)
        )
        law.near(y, prefix_by_hand(*args, lengths, IDS), 1e-12)


def test_prefix_then_decoding_by_the_op_alone():
    args, lengths = arrays(), np.array([5, 11])
    wanted = prefix_by_hand(*args, lengths)
    with jax.enable_x64(True):
        q, k, v, k_enc, v_enc = map(jnp.asarray, args)
        first = [x[:, :12] for x in (q, k, v)]
        y, state = prefix_based(*first, k_enc, v_enc, prefix_length=jnp.asarray(lengths))
        ys = [y]
        for i in range(12, 17):
            y, state = based(*(x[:, i : i + 1] for x in (q, k, v)), initial_state=state)
            ys.append(y)
    law.near(np.concatenate(ys, axis=1), wanted, 1e-12)


def test_a_traced_prefix_that_is_too_long_is_cut():
    q, k, v, k_enc, v_enc = (jnp.asarray(x, jnp.float32) for x in arrays())
    op = jax.jit(lambda m: prefix_based(q, k, v, k_enc, v_enc, prefix_length=m)[0])
    law.near(op(jnp.array([99, 11])), op(jnp.array([11, 11])), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prefix_length=np.array([3, 12])), "row 1 is 12; .* 11 encoder tokens"),
        (dict(prefix_length=np.array([-1, 2])), "row 0 is -1"),
        (dict(prefix_length=np.array([3])), "prefix_length is"),
        (dict(k_enc=np.zeros((2, 18, 2, 4)), v_enc=np.zeros((2, 18, 2, 3))), "m <= t"),
        (dict(v_enc=np.zeros((2, 11, 1, 3))), "do not fit"),
    ],
)
def test_bad_prefixes_are_named(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    names = ("q", "k", "v", "k_enc", "v_enc")
    good = dict(zip(names, arrays())) | dict(prefix_length=np.array([3, 4]))
    with pytest.raises(ValueError, match=message):
        prefix_based(**(good | change))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("normalize", [True, False])
def test_bidirectional_tokens_see_their_whole_segment(normalize, ids, form):
    args = arrays()[:3]
    real = True if ids is None else (ids > 0)[..., None, None]
    by_hand = lambda *a: np.where(real, bidirectional_by_hand(*a, ids, normalize), 0)
    with jax.enable_x64(True):
        op = lambda *a: bidirectional_based(
            *a,
            segment_ids=None if ids is None else jnp.asarray(ids),
            normalize=normalize,
            implementation=form,
        )
        law.near(jax.jit(op)(*args), by_hand(*args), 1e-12)
        check_gradient(op, by_hand, args)


def test_bidirectional_padding_is_never_read_and_heads_are_shared():
    given = law.arguments(law.Case(2, 17, 4, 2, 4, 3))
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x) for x in given[:3])
        nan = jnp.where(jnp.asarray(IDS > 0)[..., None, None], 0, jnp.nan)
        y = bidirectional_based(q + nan, k + nan, v + nan, segment_ids=jnp.asarray(IDS))
    shared = [np.repeat(x, 2, axis=2) for x in given[1:3]]
    wanted = bidirectional_by_hand(given.q, *shared, IDS)
    law.near(y, np.where((IDS > 0)[..., None, None], wanted, 0), 1e-12)
