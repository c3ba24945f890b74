"""The law over the registry: a registered mixer cannot escape it. `pytest tests/jaxmodels/mixers/test_law.py -k NAME`."""

import functools

import pytest

from jaxmodels.mixers.registry import MIXERS
from tests.jaxmodels.mixers.law import (
    CHECKS,
    Subject,
    check_against_wide,
    check_splits,
    with_x64,
)

# Fields that the defaults do not reach. Every mixer also runs with its defaults.
VARIANTS = {
    "attention": {
        "grouped_rotary": dict(num_heads=4, num_kv_heads=2, rotary_fraction=1.0),
        "partial_rotary": dict(num_heads=2, rotary_fraction=0.5, use_bias=False),
    },
    "sliding_window": {
        "one": dict(window=1),
        "three_grouped": dict(window=3, num_heads=4, num_kv_heads=2, rotary_fraction=1.0),
    },
    "based": {
        "odd": dict(feature_dim=5, num_heads=2, head_dim=7),
        "grouped": dict(feature_dim=4, num_heads=4, num_kv_heads=2),
        "chunked": dict(feature_dim=4, implementation="chunked"),
    },
    "base_conv": {
        "long": dict(kernel_size=-1, max_len=16),
        "explicit": dict(kernel_size=-1, implicit=False, max_len=16),
        "wide": dict(kernel_size=5, use_act=True),
    },
    "hyena": {"short": dict(max_len=16)},
}
CASES = {name: functools.partial(make, 16) for name, make in MIXERS.items()} | {
    f"{name}-{variant}": functools.partial(MIXERS[name], 16, **fields)
    for name, variants in VARIANTS.items()
    for variant, fields in variants.items()
}


@functools.cache
def subject(case: str, dtype: str) -> Subject:
    return Subject(CASES[case], dtype)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
@with_x64
def test_float64(case, check):
    CHECKS[check](subject(case, "float64"))


@pytest.mark.parametrize("case", CASES)
@with_x64
def test_float32(case):
    narrow = subject(case, "float32")
    check_splits(narrow)
    check_against_wide(narrow, subject(case, "float64"))


@pytest.mark.parametrize("case", CASES)
@with_x64
def test_bfloat16(case):
    check_against_wide(subject(case, "bfloat16"), subject(case, "float64"))
