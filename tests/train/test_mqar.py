"""The MQAR generator: every rule of the process on generated rows, its distributions, its determinism, bad input."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from train.data import mqar
from train.data.mqar import Segment
from train.data.mqar_mixes import BASED_FIG2_TEST, BASED_FIG2_TRAIN, ZOOLOGY_FIG2

# Seeds are fixed, so a test either always passes or never does; the bound says how unlucky a right generator may be.
UNLUCKY = 1e-3

generate = jax.jit(mqar.examples, static_argnums=0)
draw = jax.jit(mqar.draw, static_argnums=0)
choose = jax.jit(mqar.without_replacement, static_argnums=1)
race = jax.jit(mqar.power_law_slots, static_argnums=(1, 2))


def rows(segment, indices):
    return {
        k: np.asarray(v) for k, v in generate(segment, jnp.asarray(indices, jnp.uint32)).items()
    }


def assert_rules(segment, batch):
    """Section by section, the process of the module's docstring, on a batch of rows."""
    n, context, half = segment.num_kv_pairs, segment.context, segment.vocab_size // 2
    tokens, positions, labels = batch["tokens"], batch["positions"], batch["labels"]
    assert tokens.shape == (len(tokens), segment.length)
    assert positions.shape == labels.shape == (len(tokens), n)
    assert all(a.dtype == np.int32 for a in batch.values())
    assert tokens.min() >= 0
    assert tokens.max() < segment.vocab_size
    first_pass = tokens[:, : 2 * n]
    keys, values = first_pass[:, 0::2], first_pass[:, 1::2]
    assert keys.min() >= 1
    assert keys.max() < half
    assert values.min() >= half
    # distinct within an example
    for drawn in (keys, values, positions):
        assert all(len(set(row)) == n for row in drawn.tolist())
    # every pass repeats the pairs
    np.testing.assert_array_equal(tokens[:, :context], np.tile(first_pass, (1, segment.num_passes)))
    # pair j is asked once, at positions[:, j], on the first token of a slot behind the context
    assert positions.min() >= context
    assert positions.max() < segment.length
    assert not ((positions - context) % 2).any()
    np.testing.assert_array_equal(np.take_along_axis(tokens, positions, 1), keys)
    np.testing.assert_array_equal(labels, values)
    if not segment.random_non_queries:
        region = tokens[:, context:].copy()
        np.put_along_axis(region, positions - context, 0, 1)
        assert not region.any()


CASES = {
    "papers": Segment(64, 4, seed=1),
    "zeros": Segment(64, 4, random_non_queries=False, seed=2),
    "two passes": Segment(48, 4, num_passes=2, vocab_size=50, seed=3),
    "three passes, full": Segment(24, 3, num_passes=3, vocab_size=25, random_non_queries=False),
    "every slot taken": Segment(64, 16, random_non_queries=False, seed=4),
    "smallest": Segment(4, 1, vocab_size=5, seed=5),
    "odd vocabulary": Segment(66, 16, vocab_size=67, power_a=1.0, seed=2**32 - 1),
    "many pairs": Segment(256, 64, seed=6),
}


@pytest.mark.parametrize("segment", CASES.values(), ids=CASES.keys())
def test_rows_obey_every_rule(segment):
    assert_rules(segment, rows(segment, np.arange(64)))


def test_a_full_query_region_asks_in_every_slot():
    positions = rows(CASES["every slot taken"], np.arange(64))["positions"]
    np.testing.assert_array_equal(np.sort(positions), np.tile(32 + 2 * np.arange(16), (64, 1)))


# --- distributions


def test_filler_is_uniform_over_the_whole_vocabulary():
    segment = Segment(64, 4, vocab_size=67, seed=11)
    filler = np.asarray(
        jax.jit(lambda i: mqar.fill(segment, i))(jnp.arange(2048, dtype=jnp.uint32))
    )
    assert filler.shape == (2048, 56)
    counts = np.bincount(filler.ravel(), minlength=67)
    assert chisquare(counts).pvalue > UNLUCKY
    # and it is what stands between the queries of a row
    batch = rows(segment, np.arange(64))
    region = filler[:64].copy()
    np.put_along_axis(region, batch["positions"] - 8, batch["tokens"][:, 0:8:2], 1)
    np.testing.assert_array_equal(batch["tokens"][:, 8:], region)


def test_keys_and_values_are_uniform_in_every_place():
    segment = Segment(20, 4, vocab_size=24, seed=12)
    keys, values, _ = (np.asarray(x) for x in draw(segment, jnp.arange(4096, dtype=jnp.uint32)))
    for drawn, first, size in ((keys, 1, segment.num_keys), (values, 12, segment.num_values)):
        for j in range(4):
            assert chisquare(np.bincount(drawn[:, j] - first, minlength=size)).pvalue > UNLUCKY


def test_every_ordered_choice_without_replacement_is_equally_likely():
    bits = np.random.default_rng(0).integers(0, 2**32, (20_000, 3), dtype=np.uint32)
    drawn = np.asarray(choose(jnp.asarray(bits), 5))
    code = drawn @ np.array([25, 5, 1])
    cells = [a * 25 + b * 5 + c for a, b, c in itertools.permutations(range(5), 3)]
    counts = np.bincount(code, minlength=125)
    assert counts.sum() == counts[cells].sum()
    assert chisquare(counts[cells]).pvalue > UNLUCKY


@pytest.mark.parametrize(("n", "size"), [(1, 1), (7, 7), (12, 16), (64, 4095), (256, 300)])
def test_without_replacement_is_the_shrinking_range(n, size):
    bits = np.random.default_rng(n).integers(0, 2**32, (20, n), dtype=np.uint32)
    drawn = np.asarray(choose(jnp.asarray(bits), size))
    for row, got in zip(bits, drawn):
        left = list(range(size))
        assert [left.pop(int(word) % len(left)) for word in row] == got.tolist()


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0, 2.5])
def test_slots_follow_the_power_law(power_a):
    space, examples = 7, 20_000
    bits = np.random.default_rng(1).integers(0, 2**32, (examples, space), dtype=np.uint32)
    slots = np.asarray(race(jnp.asarray(bits), 3, power_a))
    p = np.arange(1, space + 1) ** (power_a - 1.0)
    p /= p.sum()
    first = np.bincount(slots[:, 0], minlength=space)
    assert chisquare(first, examples * p).pvalue > UNLUCKY
    # all three in order: p(g1) p(g2) / (1 - p(g1)) p(g3) / (1 - p(g1) - p(g2))
    triples = list(itertools.permutations(range(space), 3))
    expected = [p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in triples]
    counts = np.bincount(slots @ np.array([49, 7, 1]), minlength=343)
    counts = counts[[a * 49 + b * 7 + c for a, b, c in triples]]
    assert counts.sum() == examples
    assert chisquare(counts, examples * np.array(expected)).pvalue > UNLUCKY


def test_the_power_law_holds_in_generated_rows():
    segment = Segment(64, 4, seed=13)
    slots = np.asarray(draw(segment, jnp.arange(8192, dtype=jnp.uint32))[2])
    p = np.arange(1, 29) ** -0.99
    counts = np.bincount(slots[:, 0], minlength=28)
    assert chisquare(counts, 8192 * p / p.sum()).pvalue > UNLUCKY


def test_extreme_bits_are_no_exception():
    bits = jnp.asarray([[0, 2**32 - 1, 5], [2**32 - 1] * 3], jnp.uint32)
    for drawn in (race(bits, 3, 0.01), choose(bits, 3)):
        np.testing.assert_array_equal(np.sort(np.asarray(drawn)), [[0, 1, 2]] * 2)


# --- determinism


ONE = Segment(32, 3, seed=7)
TWENTY = np.arange(20)


def test_an_example_is_a_function_of_seed_and_index():
    whole = rows(ONE, TWENTY)
    order = np.random.default_rng(0).permutation(20)
    shuffled = rows(ONE, order)
    pairwise = jax.jit(lambda i: jax.lax.map(lambda two: mqar.examples(ONE, two), i))
    in_twos = pairwise(jnp.arange(20, dtype=jnp.uint32).reshape(10, 2))
    for name, array in whole.items():
        np.testing.assert_array_equal(array[order], shuffled[name])
        np.testing.assert_array_equal(array, np.asarray(in_twos[name]).reshape(array.shape))


def test_examples_differ_by_index_and_by_seed():
    one, other = (rows(s, TWENTY)["tokens"] for s in (ONE, dataclasses.replace(ONE, seed=8)))
    assert len({tuple(row) for row in [*one.tolist(), *other.tolist()]}) == 40


def test_the_last_index_of_an_endless_segment_exists():
    indices = [2**32 - 1, 2**31, *range(18)]
    batch = rows(ONE, indices)
    assert_rules(ONE, batch)
    assert len({tuple(r) for r in batch["tokens"].tolist()}) == 20


def test_filler_changes_nothing_else():
    filled = rows(ONE, TWENTY)
    empty = rows(dataclasses.replace(ONE, random_non_queries=False), TWENTY)
    np.testing.assert_array_equal(filled["positions"], empty["positions"])
    np.testing.assert_array_equal(filled["labels"], empty["labels"])
    somewhere = empty["tokens"] > 0
    np.testing.assert_array_equal(filled["tokens"][somewhere], empty["tokens"][somewhere])


PINNED = {
    "tokens": [10, 26, 15, 27, 15, 24, 10, 7, 11, 22, 13, 3],
    "positions": [6, 4],
    "labels": [26, 27],
}


def test_the_numbers_stay():
    """Example 0 of seed 0, so that no refactoring changes the data of a published run unnoticed."""
    batch = rows(Segment(12, 2, vocab_size=32), [0])
    assert {k: v[0].tolist() for k, v in batch.items()} == PINNED


def test_float64_mode_changes_nothing():
    plain = rows(ONE, TWENTY)
    with jax.enable_x64(True):
        wide = rows(ONE, TWENTY)
    for name, array in plain.items():
        assert wide[name].dtype == np.int32
        np.testing.assert_array_equal(array, wide[name])


# --- bad input

BAD = {
    "odd length": (dict(length=65), "length 65 is odd, .* use 66"),
    "too many pairs": (
        dict(num_kv_pairs=20),
        r"4\*kv > length: 20 pairs in 1 pass and their queries need 80 tokens, length is 64; "
        "use length 80 or more, or at most 16 pairs",
    ),
    "too many passes": (dict(num_kv_pairs=8, num_passes=4), r"10\*kv > length: .* at most 6 pairs"),
    "small vocabulary": (
        dict(vocab_size=64),
        "vocab_size 64 must be larger than length 64; use 65",
    ),
    "more pairs than keys": (dict(num_kv_pairs=15, vocab_size=30), "vocab_size 30 must be larger"),
    "no pairs": (dict(num_kv_pairs=0), "num_kv_pairs must be at least 1, got 0"),
    "negative length": (dict(length=-2), "length must be at least 1, got -2"),
    "no passes": (dict(num_passes=0), "num_passes must be at least 1"),
    "no examples": (dict(num_examples=0), "num_examples must be at least 1"),
    "seed too large": (dict(seed=2**32), r"seed must be in \[0, 4294967295\]"),
    "power zero": (dict(power_a=0), "power_a must be a positive number .* got 0"),
    "power nan": (dict(power_a=float("nan")), "power_a must be a positive number"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_segments_are_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Segment(**{"length": 64, "num_kv_pairs": 4} | change)
    assert "\n" not in str(caught.value)


@given(
    pairs=st.integers(1, 40),
    passes=st.integers(1, 3),
    more=st.integers(0, 3),
    words=st.integers(1, 3),
)
def test_what_is_accepted_has_room(pairs, passes, more, words):
    """The capacity rule and V > length leave enough keys, values and slots, so no rule of their own is needed."""
    length = 2 * pairs * (passes + 1) + 2 * more
    segment = Segment(length, pairs, vocab_size=length + words, num_passes=passes)
    assert segment.num_keys >= pairs
    assert segment.num_values >= pairs
    assert segment.space >= pairs
    assert segment.context + 2 * segment.space == length


# --- the papers' mixes


def test_the_mixes_are_the_papers():
    listed = [*BASED_FIG2_TRAIN, *BASED_FIG2_TEST]
    listed += [s for run in ZOOLOGY_FIG2.values() for s in (*run["train"], *run["test"])]
    assert all(Segment(**fields) for fields in listed)
    # ~707 steps an epoch at batch 256 (the papers' 22.6k steps are 32 epochs)
    assert sum(-(-s["num_examples"] // 256) for s in BASED_FIG2_TRAIN) == 707
    assert [(s["length"], s["num_kv_pairs"]) for s in BASED_FIG2_TEST][-1] == (1024, 256)
    assert {n: run["batch_size"] for n, run in ZOOLOGY_FIG2.items()} == {
        64: 512, 128: 512, 256: 256, 512: 128,
    }  # fmt: skip
