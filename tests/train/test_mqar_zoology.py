"""Zoology mode against what the original wrote (tests/golden/make_zoology_mqar.py), and the cache on disk."""

import json
import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from train.data import mqar, mqar_zoology
from train.data.mqar import Segment

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "zoology_mqar.npz")
ABOUT = json.loads(str(GOLDEN["about"]))
SMALL = Segment(16, 3, num_examples=20, vocab_size=64, seed=5)


def assert_matches_the_original(segment, name):
    """Every token that is not filler and every label, exactly; every token where there is no filler."""
    inputs, labels = GOLDEN[f"{name}/inputs"], GOLDEN[f"{name}/labels"]
    count = len(inputs)
    draws = {k: jnp.asarray(v[:count]) for k, v in mqar_zoology.generate(segment).items()}
    batch = {k: np.asarray(v) for k, v in mqar.assemble(segment, **draws, filler=None).items()}
    full = np.full_like(labels, -100)
    np.put_along_axis(full, batch["positions"], batch["labels"], axis=1)
    np.testing.assert_array_equal(full, labels)
    fixed = batch["tokens"] > 0
    assert fixed.sum() == count * 3 * segment.num_kv_pairs
    if segment.random_non_queries:
        np.testing.assert_array_equal(batch["tokens"][fixed], inputs[fixed])
    else:
        np.testing.assert_array_equal(batch["tokens"], inputs)


@pytest.mark.parametrize("case", range(len(ABOUT["cases"])))
def test_numbers_are_the_originals(case):
    length, pairs, count, vocab, power_a, filled, seed = ABOUT["cases"][case]
    segment = Segment(
        length,
        pairs,
        num_examples=count,
        vocab_size=vocab,
        power_a=power_a,
        random_non_queries=filled,
        seed=seed,
    )
    assert_matches_the_original(segment, f"case{case}")


def test_segment_seeds_are_the_originals():
    train, test = ABOUT["prepared"]["train"], ABOUT["prepared"]["test"]
    seeds = mqar_zoology.segment_seeds(mqar_zoology.PAPER_SEED, len(train), len(test))
    for split, sizes, own in zip(("train", "test"), (train, test), seeds):
        for i, ((length, pairs, count), seed) in enumerate(zip(sizes, own)):
            segment = Segment(length, pairs, num_examples=count, vocab_size=256, seed=seed)
            assert_matches_the_original(segment, f"{split}{i}")


@pytest.mark.parametrize("seed", [0, 123, 2**32 - 1])
def test_train_and_test_seeds_never_meet(seed):
    train, test = mqar_zoology.segment_seeds(seed, 50, 50)
    assert len({*train, *test}) == 100
    assert max(train) < 2**31 <= min(test)
    assert mqar_zoology.segment_seeds(seed, 50, 3)[0] == train


def test_several_passes_work_where_the_original_raises():
    once, twice = (Segment(32, 3, 8, vocab_size=64, num_passes=p, seed=5) for p in (1, 2))
    one, two = mqar_zoology.generate(once), mqar_zoology.generate(twice)
    np.testing.assert_array_equal(one["keys"], two["keys"])
    np.testing.assert_array_equal(one["values"], two["values"])
    assert two["slots"].max() < twice.space == 10
    batch = mqar.assemble(twice, **{k: jnp.asarray(v) for k, v in two.items()}, filler=None)
    tokens = np.asarray(batch["tokens"])
    np.testing.assert_array_equal(tokens[:, :6], tokens[:, 6:12])
    np.testing.assert_array_equal(
        np.take_along_axis(tokens, np.asarray(batch["positions"]), 1), two["keys"]
    )


def test_an_endless_segment_cannot_be_drawn_ahead():
    with pytest.raises(ValueError, match="give the segment a num_examples"):
        mqar_zoology.generate(Segment(16, 3))


# --- the cache


def test_the_second_load_reads_the_file(tmp_path, monkeypatch):
    first = mqar_zoology.load(SMALL, tmp_path / "deep" / "down")
    monkeypatch.setattr(mqar_zoology, "generate", None)
    second = mqar_zoology.load(SMALL, tmp_path / "deep" / "down")
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert [p.suffix for p in (tmp_path / "deep" / "down").iterdir()] == [".npz"]


@pytest.mark.parametrize("damage", ["empty", "half", "other shape", "other names"])
def test_a_damaged_file_is_drawn_again(tmp_path, caplog, damage):
    whole = mqar_zoology.load(SMALL, tmp_path)
    path = mqar_zoology.cache_path(SMALL, tmp_path)
    content = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "other shape":
        np.savez(path, **{name: array[:5] for name, array in whole.items()})
    else:
        np.savez(path, other=np.zeros(3))
    with caplog.at_level(logging.WARNING):
        again = mqar_zoology.load(SMALL, tmp_path)
    np.testing.assert_array_equal(again["slots"], whole["slots"])
    assert "drawing it again" in caplog.text
    assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with caplog.at_level(logging.WARNING):
        draws = mqar_zoology.load(SMALL, in_the_way / "cache")
    assert draws["keys"].shape == (20, 3)
    assert "cannot keep the generated data" in caplog.text


def test_a_failed_write_leaves_nothing_behind(tmp_path, caplog, monkeypatch):
    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    mqar_zoology.load(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_the_file_is_named_by_what_decides_its_numbers(tmp_path):
    base = dict(length=32, num_kv_pairs=3, num_examples=20)
    names = {
        mqar_zoology.cache_path(Segment(**fields), tmp_path)
        for fields in (
            base,
            base | dict(seed=1),
            base | dict(num_examples=21),
            base | dict(vocab_size=64),
            base | dict(power_a=0.02),
            base | dict(num_passes=2),
        )
    }
    assert len(names) == 6
    unfilled = Segment(**base, random_non_queries=False)
    assert mqar_zoology.cache_path(unfilled, tmp_path) in names


def test_the_cache_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert mqar_zoology.cache_path(SMALL).parent == tmp_path / "jaxmodels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mqar_zoology.default_cache_dir() == tmp_path / ".cache" / "jaxmodels"


def test_progress_counts_to_its_end(monkeypatch, capsys):
    monkeypatch.setattr(mqar_zoology, "_SLOW", 1)
    ticks = []
    mqar_zoology.generate(Segment(4, 1, 2000, vocab_size=6), lambda: ticks.append(1))
    assert len(ticks) == 6
    with mqar_zoology._progress(SMALL) as tick, mqar_zoology._progress(SMALL) as inner:
        tick()
        inner()
    assert capsys.readouterr().out == ""
