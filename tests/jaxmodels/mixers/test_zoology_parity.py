"""Our mixers with the weights of HazyResearch/zoology against what its own code computed (tests/golden/make_zoology_golden.py)."""

import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from jaxmodels.mixers.registry import MIXERS

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "zoology_mixers.npz"
# Float32 on both sides, sums of up to a few hundred terms in different orders; relative to the largest entry.
TOLERANCE = 1e-4

# Fields that make our mixer the golden case, whose width is 8 and whose filters have 20 lags (12 for the explicit one).
CASES = {
    "attention": dict(name="attention"),
    "attention_heads": dict(name="attention", num_heads=2),
    "sliding_window": dict(
        name="sliding_window", window=5
    ),  # block_size 4 sees 4 tokens and itself
    "based": dict(name="based", feature_dim=4, num_heads=2),
    "base_conv": dict(name="base_conv"),
    "base_conv_act": dict(name="base_conv", kernel_size=4, use_act=True),
    "base_conv_long": dict(name="base_conv", kernel_size=-1, max_len=20),
    "base_conv_explicit": dict(name="base_conv", kernel_size=-1, implicit=False, max_len=12),
    "hyena": dict(name="hyena", max_len=20, filter_order=16),
}


def matrix(w):
    return w.T


def taps(w):
    """[d, 1, k], newest token last -> [k, d], row = lag."""
    return w[:, 0, ::-1].T


def vector(w):
    return w.reshape(-1)


def rows(w):
    return w[0]


def linear(theirs, ours, bias=True):
    pairs = {f"{theirs}.weight": (f"{ours}/kernel", matrix)}
    return pairs | ({f"{theirs}.bias": (f"{ours}/bias", vector)} if bias else {})


QKV = linear("Wqkv", "Wqkv") | linear("out_proj", "out_proj")
SHORT = {"conv.conv.weight": ("conv/kernel", taps), "conv.conv.bias": ("conv/bias", vector)}
FILTER = "filter_fn.implicit_filter"
# mixer -> their parameter -> (our parameter, their array as ours)
NAMES = {
    "attention": QKV,
    "attention_heads": QKV,
    "sliding_window": QKV,
    "based": linear("proj_q", "proj_q", False)
    | linear("proj_k", "proj_k", False)
    | linear("proj_v", "proj_v", False)
    | linear("proj_o", "out_proj", False),
    "base_conv": linear("projection", "projection") | SHORT,
    "base_conv_act": linear("projection", "projection") | SHORT,
    "base_conv_long": linear("projection", "projection")
    | linear("conv.mlp.0", "conv/filter/mlp_0")
    | linear("conv.mlp.2", "conv/filter/mlp_2"),
    "base_conv_explicit": linear("projection", "projection")
    | {"conv.filter": ("conv/filter/kernel", matrix)},
    "hyena": linear("in_proj", "in_proj")
    | linear("out_proj", "out_proj")
    | {
        "short_filter.weight": ("short_filter/kernel", taps),
        "short_filter.bias": ("short_filter/bias", vector),
        "filter_fn.bias": ("filter_fn/bias", vector),
        "filter_fn.pos_emb.z": ("filter_fn/z", rows),
        f"{FILTER}.1.freq": ("filter_fn/freq", vector),
    }
    | linear(f"{FILTER}.0", "filter_fn/implicit_filter_0")
    | linear(f"{FILTER}.2", "filter_fn/implicit_filter_2")
    | linear(f"{FILTER}.4", "filter_fn/implicit_filter_4")
    | linear(f"{FILTER}.6", "filter_fn/implicit_filter_6", False),
}


@functools.cache
def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file}


def converted(case: str, group: str) -> dict:
    """Their arrays of `group` ("state" or "grad") as our parameter tree."""
    return traverse_util.unflatten_dict(
        {
            ours: convert(golden()[f"{case}/{group}/{theirs}"])
            for theirs, (ours, convert) in NAMES[case].items()
        },
        sep="/",
    )


def near(actual, expected, what):
    assert actual.shape == expected.shape, what
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case):
    """Given their weights, When run on their input, Then outputs and every gradient are theirs."""
    fields = dict(CASES[case])
    mixer = MIXERS[fields.pop("name")](8, **fields)
    x, dy = golden()[f"{case}/x"], golden()[f"{case}/dy"]
    params = converted(case, "state")
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, shapes)

    @jax.jit
    def run(params, x):
        y, pull = jax.vjp(lambda params, x: mixer.apply({"params": params}, x)[0], params, x)
        return y, pull(dy)

    y, (dparams, dx) = run(params, x)
    near(y, golden()[f"{case}/y"], "output")
    near(dx, golden()[f"{case}/dx"], "input gradient")
    expected = converted(case, "grad")
    for path, gradient in jax.tree.leaves_with_path(dparams):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        near(gradient, traverse_util.flatten_dict(expected, sep="/")[name], name)


@pytest.mark.parametrize("case", [c for c in CASES if not c.endswith(("_act", "_heads"))])
def test_initialisation(case):
    """Same spread as theirs after `_init_weights` for two layers: constants equal, deviations within sampling error."""
    about = json.loads(str(golden()["about"]))
    layers, width = about["initial_layers"], about["initial_width"]
    fields = {"name": CASES[case]["name"]}
    if "conv" in case:
        fields |= dict(
            kernel_size=CASES[case].get("kernel_size", 3), implicit=not case.endswith("explicit")
        )
    # Their rescaling of residual outputs goes by the name "out_proj", which their Based ("proj_o") does not have.
    scale = 0.02 if case == "based" else 0.02 / math.sqrt(2 * layers)
    mixer = MIXERS[fields.pop("name")](
        width, out_kernel_init=nn.initializers.normal(scale), **fields
    )
    params = jax.jit(mixer.init)(jax.random.key(0), np.zeros((1, 4, width), np.float32))["params"]
    ours = traverse_util.flatten_dict(params, sep="/")
    for theirs, (name, _) in NAMES[case].items():
        mean, deviation, low, high = about["initial"][case][theirs]
        value = np.asarray(ours[name], np.float64)
        if low == high or name.endswith("/z"):
            np.testing.assert_allclose(
                [value.mean(), value.std(), value.min(), value.max()],
                [mean, deviation, low, high],
                atol=1e-6,
            )
            continue
        # Two samples of n normal values: the ratio of their deviations spreads by 1/sqrt(n); five times that.
        assert abs(value.std() / deviation - 1) < 5 / math.sqrt(value.size), name
        assert abs(value.mean() - mean) < 7.5 * deviation / math.sqrt(value.size), name
        if name.endswith(("conv/kernel", "short_filter/kernel")):  # uniform, not normal
            assert np.abs(value).max() < 1 / math.sqrt(3) < 1.1 * np.abs(value).max()
