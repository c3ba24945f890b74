"""State sizes: the bytes that exist, and the bytes behind the published figures.

The published counts are the points of the recall-memory figure of BASED (arXiv 2402.18668, figure 2): two layers, a gated
short convolution (3 d elements) and the mixer, at test length 1024 for those that grow.
"""

import jax
import pytest

from jaxmodels.models.language_model import build_language_model
from jaxmodels.state_size import legacy_state_bytes, state_bytes

CONV = {"name": "base_conv", "kernel_size": 3}
BASED = {
    (48, 8): 9_396,
    (64, 8): 12_468,
    (128, 8): 24_756,
    (48, 16): 30_564,
    (64, 16): 40_548,
    (48, 24): 64_276,
    (128, 16): 80_484,
    (64, 24): 85_268,
    (64, 32): 146_628,
    (256, 16): 160_356,
    (128, 24): 169_236,
    (128, 32): 291_012,
    (64, 64): 558_468,
    (256, 32): 579_780,
    (128, 64): 1_108_356,
    (256, 64): 2_208_132,
}
WINDOWS = {
    8: 9_728,
    16: 17_920,
    32: 34_304,
    64: 67_072,
    128: 132_608,
    256: 263_680,
    512: 525_824,
    1024: 1_050_112,
}


def model(d_model, *mixers):
    return build_language_model(vocab_size=8, d_model=d_model, num_layers=2, mixers=list(mixers))


@pytest.mark.parametrize(("point", "published"), BASED.items())
def test_based(point, published):
    d, f = point
    m = model(d, CONV, {"name": "based", "feature_dim": f})
    assert legacy_state_bytes(m, 1024) == published
    # The real state: k-1 = 2 inputs of the convolution, the same sums, and two cursors of two integers.
    assert state_bytes(m, 1024) == published - 4 * d + 2 * 2 * 4


@pytest.mark.parametrize(("window", "published"), WINDOWS.items())
def test_sliding_window(window, published):
    m = model(128, CONV, {"name": "sliding_window", "window": window})
    assert legacy_state_bytes(m, 1024) == published
    assert state_bytes(m, 1024) == published - 4 * 128 + 2 * 2 * 4


@pytest.mark.parametrize(("d", "published"), [(64, 525_056), (128, 1_050_112)])
def test_attention(d, published):
    m = model(d, CONV, {"name": "attention"})
    assert legacy_state_bytes(m, 1024) == published
    assert state_bytes(m, 1024) == published - 4 * d + 2 * 2 * 4


@pytest.mark.parametrize(("d", "published"), [(64, 524_288), (128, 1_048_576), (256, 2_097_152)])
def test_hyena(d, published):
    m = model(d, {"name": "hyena", "max_len": 1024})
    assert legacy_state_bytes(m, 1024) == published
    # Each layer really keeps its gated inputs, and two inputs of the short convolution over 3 d channels.
    assert state_bytes(m, 1024) == published + 2 * (2 * 3 * d * 4 + 2 * 4)


def test_base_conv_short_and_long():
    m = model(64, CONV, {"name": "base_conv", "kernel_size": -1, "max_len": 1024})
    assert legacy_state_bytes(m, 1024) == 4 * (3 * 64 + 64 * 1024)
    assert state_bytes(m, 1024) == 4 * (2 * 64 + 64 * 1024) + 2 * 2 * 4


def test_the_reported_bytes_are_those_of_the_state_itself():
    m = model(64, CONV, {"name": "based", "feature_dim": 16})
    leaves = jax.tree.leaves(m.init_state(1, 64, "float32"))
    assert state_bytes(m, 64) == sum(x.nbytes for x in leaves)
