"""The law that every causal mixer obeys, as functions of one mixer (design: contracts; docs/mixers.md).

From the empty state, cutting a sequence anywhere, or feeding it token by token, gives the outputs and the final state of
one call; the future changes no past output; padding and packing change no real token; gradients agree with those of the
token-by-token run. All cuts run through one compiled shape: pieces are padded with id 0.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

BATCH, LENGTH, MAX_LEN = 3, 13, 16
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 5, 5, 5, 0],
        [1] * LENGTH,
        [3, 3, 3, 4] + [0] * (LENGTH - 4),
    ],
    np.int32,
)
# Relative to the largest magnitude of the reference array. Float32: about a hundred roundings of a well-conditioned sum.
# Bfloat16: 8 bits of mantissa through three products and a normaliser; the observed error of the mixers is .01 to .03.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 6e-2}


def close(actual, expected, tolerance: float, what: str) -> None:
    """Largest error over the largest magnitude of the expected array, for every leaf."""
    chex.assert_trees_all_equal_structs(actual, expected)
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.isfinite(a).all(), f"{what}{jax.tree_util.keystr(path)} is not finite"
        scale = np.abs(e).max(initial=0.0) or 1.0
        error = np.abs(a - e).max(initial=0.0) / scale
        assert error <= tolerance, (
            f"{what}{jax.tree_util.keystr(path)}: error {error:.2e} > {tolerance:.0e}"
        )


class Subject:
    """One mixer at one dtype, its parameters and its compiled calls."""

    def __init__(self, make, dtype: str = "float64", seed: int = 0):
        self.dtype = jnp.dtype(dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        self.mixer = make(dtype=self.dtype, param_dtype=wide)
        rng = np.random.default_rng(seed)
        # Data stays in numpy outside the compiled calls: eager jnp would compile an op per shape.
        self.x = rng.normal(size=(BATCH, LENGTH, self.mixer.d_model)).astype(self.dtype)
        self.params = jax.jit(self.mixer.init)(jax.random.key(seed), self.x)
        # Initial weights of 0.02 would hide errors behind tiny outputs: draw them at a scale that moves every gate.
        self.params = jax.tree.map(
            lambda p: p + jnp.asarray(rng.normal(size=p.shape, scale=0.3), p.dtype), self.params
        )
        self.apply = jax.jit(
            lambda params, x, state, ids: self.mixer.apply(params, x, state, segment_ids=ids)
        )

    def init(self, batch: int = BATCH):
        return self.mixer.init_state(batch, MAX_LEN, self.dtype)

    def call(self, x, state, ids):
        return jax.device_get(self.apply(self.params, x, state, ids))

    def pieces(self, x, ids, cuts):
        """Outputs and final state when each row is cut at the same places; every piece padded to LENGTH."""
        state, out = self.init(), []
        for start, stop in zip([0, *cuts], [*cuts, LENGTH]):
            pad = LENGTH - (stop - start)
            piece = np.pad(x[:, start:stop], ((0, 0), (0, pad), (0, 0)), constant_values=np.nan)
            y, state = self.call(piece, state, np.pad(ids[:, start:stop], ((0, 0), (0, pad))))
            out.append(y[:, : stop - start])
        return np.concatenate(out, axis=1), state


def check_state_contract(subject: Subject) -> None:
    state = subject.init()
    y, after = subject.call(subject.x, state, None)
    chex.assert_shape(y, subject.x.shape)
    assert y.dtype == subject.dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    nothing = subject.call(subject.x, None, None)
    assert nothing[1] is None
    tolerance = TOLERANCE[subject.dtype.name]
    close(nothing[0], y, tolerance, "output without a state ")
    ones = np.ones((BATCH, LENGTH), np.int32)
    with_ids = subject.call(subject.x, state, ones)
    close(with_ids, (y, after), tolerance, "one explicit segment ")
    again = subject.call(subject.x, state, ones)
    chex.assert_trees_all_equal(with_ids, again)


def check_splits(subject: Subject) -> None:
    tolerance = TOLERANCE[subject.dtype.name]
    for ids in (np.ones_like(SEGMENTS), SEGMENTS):
        whole = subject.call(subject.x, subject.init(), ids)
        for cut in range(LENGTH + 1):
            close(subject.pieces(subject.x, ids, [cut]), whole, tolerance, f"cut at {cut} ")
        every = list(range(1, LENGTH))
        close(subject.pieces(subject.x, ids, every), whole, tolerance, "token by token ")


def check_decoding(subject: Subject) -> None:
    """Calls of one token, the shape that generation uses, without and with segment ids."""
    tolerance = TOLERANCE[subject.dtype.name]
    for ids in (None, SEGMENTS):
        whole = subject.call(subject.x, subject.init(), ids)
        state, out = subject.init(), []
        for i in range(LENGTH):
            token = None if ids is None else ids[:, i : i + 1]
            y, state = subject.call(subject.x[:, i : i + 1], state, token)
            out.append(y)
        close((np.concatenate(out, 1), state), whole, tolerance, "decoding ")


def check_causality(subject: Subject) -> None:
    base, _ = subject.call(subject.x, None, None)
    for j in (0, 1, LENGTH // 2, LENGTH - 1):
        x = subject.x.copy()
        x[:, j] += 3.0
        moved, _ = subject.call(x, None, None)
        close(
            moved[:, :j], base[:, :j], TOLERANCE[subject.dtype.name], f"token {j} moved the past "
        )
        assert not np.allclose(moved[:, j], base[:, j], atol=1e-3), f"token {j} does not matter"


def check_padding_and_packing(subject: Subject) -> None:
    """Each document of a packed row gives what it gives alone; padding gives 0 whatever it holds."""
    tolerance = TOLERANCE[subject.dtype.name]
    poisoned = np.where(SEGMENTS[..., None] > 0, subject.x, np.nan).astype(subject.dtype)
    packed, _ = subject.call(poisoned, subject.init(), SEGMENTS)
    assert not np.any(np.asarray(packed, np.float64)[SEGMENTS == 0]), "padding has an output"
    for row in range(BATCH):
        for segment in set(SEGMENTS[row].tolist()) - {0}:
            (places,) = np.nonzero(SEGMENTS[row] == segment)
            alone = np.zeros_like(subject.x)
            alone[0, : len(places)] = subject.x[row, places]
            ids = np.zeros_like(SEGMENTS)
            ids[0, : len(places)] = 1
            y, _ = subject.call(alone, subject.init(), ids)
            close(packed[row, places], y[0, : len(places)], tolerance, f"segment {segment} ")


def check_gradients(subject: Subject) -> None:
    """Gradients of one call against those of the token-by-token run, which go through every state."""
    tolerance = TOLERANCE[subject.dtype.name]
    weight = np.random.default_rng(1).normal(size=subject.x.shape).astype(subject.dtype)
    ids = jnp.asarray(SEGMENTS)
    poisoned = np.where(SEGMENTS[..., None] > 0, subject.x, np.nan).astype(subject.dtype)

    def whole(params, x):
        y, _ = subject.mixer.apply(params, x, None, segment_ids=ids)
        return jnp.sum(y * weight)

    def stepwise(params, x):
        def step(state, token):
            x, ids = token
            y, state = subject.mixer.apply(params, x[:, None], state, segment_ids=ids[:, None])
            return state, y[:, 0]

        tokens = (jnp.moveaxis(x, 1, 0), ids.T)
        _, y = jax.lax.scan(step, subject.init(), tokens)
        return jnp.sum(jnp.moveaxis(y, 0, 1) * weight)

    gradients = [
        jax.jit(jax.grad(f, argnums=(0, 1)))(subject.params, poisoned) for f in (whole, stepwise)
    ]
    close(gradients[0], gradients[1], tolerance, "gradient ")
    assert not np.any(np.asarray(gradients[0][1])[SEGMENTS == 0]), "padding has a gradient"


def check_against_wide(subject: Subject, wide: Subject) -> None:
    """A narrow dtype against float64, same weights."""
    narrow_params = jax.tree.map(lambda p, w: w.astype(p.dtype), subject.params, wide.params)
    x = wide.x.astype(subject.dtype)
    y, _ = subject.apply(narrow_params, x, subject.init(), SEGMENTS)
    expected, _ = wide.call(x.astype(wide.dtype), wide.init(), SEGMENTS)
    close(y, expected, TOLERANCE[subject.dtype.name], f"{subject.dtype.name} against float64 ")


CHECKS = {
    f.__name__.removeprefix("check_"): f
    for f in (
        check_state_contract,
        check_splits,
        check_decoding,
        check_causality,
        check_padding_and_packing,
        check_gradients,
    )
}


def with_x64(f):
    @functools.wraps(f)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return f(*args, **kwargs)

    return wrapped
