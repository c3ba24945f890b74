"""Packed rows: every token of an epoch once, an order of its own for each, and a state that is one number."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.text.cache import Corpus
from train.data.text.loader import make_iterator
from train.data.text.rows import PADDING, TrainRows, held_out_rows, split
from train.errors import UserError


def corpus_of(*sizes: int) -> Corpus:
    """Tokens 0, 1, 2, ..., so that a token is its own place."""
    starts = np.cumsum([0, *sizes[:-1]])
    return Corpus(np.arange(sum(sizes), dtype=np.int32), starts.astype(np.int64))


def epoch_of(rows: TrainRows, number: int) -> np.ndarray:
    first = number * rows.per_epoch
    return np.stack([rows.row(i) for i in range(first, first + rows.per_epoch)])


CORPUS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(CORPUS, st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_an_epoch_has_every_token_once_but_a_remainder(sizes, length, seed):
    corpus = corpus_of(*sizes)
    total = sum(sizes)
    if total < length + 1:
        with pytest.raises(UserError, match=f"{total} tokens.*needs {length + 1}"):
            TrainRows(corpus, length, seed)
        return
    rows = TrainRows(corpus, length, seed)
    assert rows.per_epoch == total // length
    seen = epoch_of(rows, 1)
    assert seen.dtype == np.int32
    assert seen.shape == (rows.per_epoch, length + 1)
    inputs = seen[:, :-1].ravel()
    assert len(np.unique(inputs)) == len(inputs)
    # a step from one token to the next is by one, except from a document's last to a document's first
    starts = set(corpus.starts.tolist())
    lasts = {start - 1 for start in starts if start} | {total - 1}
    for row in seen:
        for a, b in itertools.pairwise(row):
            assert b == a + 1 or (a in lasts and b in starts)
    # a row goes on with another row's beginning, or with the remainder
    firsts = set(seen[:, 0].tolist())
    assert sum(int(last) in firsts for last in seen[:, -1]) >= rows.per_epoch - 1


def test_epochs_differ_and_a_row_is_a_function_of_seed_and_index():
    corpus = corpus_of(*[7] * 30)
    rows = TrainRows(corpus, 16, 5)
    first, second = epoch_of(rows, 0), epoch_of(rows, 1)
    assert not np.array_equal(first, second)
    # whole documents move: the order of the documents is another one in each epoch
    order = [tuple(token // 7 for token in e.ravel() if token % 7 == 0) for e in (first, second)]
    assert order[0] != order[1]
    again = TrainRows(corpus, 16, 5)
    for index in (40, 3, 25, 0, 1000, 3):
        np.testing.assert_array_equal(rows.row(index), again.row(index))
    assert not np.array_equal(epoch_of(TrainRows(corpus, 16, 6), 0), first)


def test_the_order_is_fixed_for_good():
    """Checkpoints rely on it: a change of this sequence breaks exact resume of directories on people's disks."""
    rows = TrainRows(corpus_of(3, 4, 5, 6), 4, 1)
    random = np.random.Generator(np.random.Philox(key=[1, 0]))
    documents = random.permutation(4)
    circle = np.concatenate(
        [np.arange(18)[[0, 3, 7, 12][d] :][: [3, 4, 5, 6][d]] for d in documents]
    )
    offset = random.integers(18)
    row = random.permutation(4)[2]
    expected = np.take(circle, offset + 4 * row + np.arange(5), mode="wrap")
    np.testing.assert_array_equal(rows.row(2), expected)


def test_threads_get_the_same_rows():
    corpus = corpus_of(*[5] * 40)
    rows = TrainRows(corpus, 8, 0)
    indices = np.random.default_rng(0).integers(0, 6 * rows.per_epoch, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(rows.row, indices))
    alone = TrainRows(corpus, 8, 0)
    for index, row in zip(indices, together):
        np.testing.assert_array_equal(row, alone.row(index))


@given(st.integers(2, 60), st.integers(1, 70))
def test_held_out_labels_are_every_token_but_the_first(total, length):
    rows, counts = held_out_rows(corpus_of(total), length)
    labels = rows[:, 1:]
    assert labels[labels != PADDING].tolist() == list(range(1, total))
    assert counts.tolist() == np.sum(labels != PADDING, axis=1).tolist()
    assert min(counts) > 0
    assert counts.sum() == total - 1
    real = labels != PADDING
    assert (rows[:, :-1][real] == labels[real] - 1).all()


def test_a_cut_at_a_document_where_one_is_near():
    train, held_out = split(corpus_of(50, 39, 11), 0.1)  # 90 is asked for, 89 is a start
    assert (len(train.tokens), train.starts.tolist()) == (89, [0, 50])
    assert (held_out.tokens[0], held_out.starts.tolist()) == (89, [0])
    train, held_out = split(corpus_of(50, 35, 10, 5), 0.1)  # 85 and 95 are too far
    assert (len(train.tokens), train.starts.tolist()) == (90, [0, 50, 85])
    assert (len(held_out.tokens), held_out.starts.tolist()) == (10, [0, 5])
    with pytest.raises(UserError, match="between 0 and 1"):
        split(corpus_of(100), 1.0)
    with pytest.raises(UserError, match="leaves 10 to train on and 0"):
        split(corpus_of(10), 0.01)
    with pytest.raises(UserError, match="1 tokens"):
        held_out_rows(corpus_of(1), 4)


ROWS = dict(length=16, seed=3)


def test_batches_are_rows_in_order_and_shards_are_parts_of_them():
    rows = TrainRows(corpus_of(*[9] * 50), **ROWS)
    whole = make_iterator(rows, 6, num_threads=0, prefetch=0)
    shards = [make_iterator(rows, 6, shard=(j, 3)) for j in range(3)]
    for i in range(12):
        batch = next(whole)
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(batch, np.stack([rows.row(6 * i + k) for k in range(6)]))
        parts = [next(shard) for shard in shards]
        assert parts[0].shape == (2, 17)
        np.testing.assert_array_equal(np.stack(parts, axis=1).reshape(6, 17), batch)
    with pytest.raises(UserError, match="multiple of 4"):
        make_iterator(rows, 6, shard=(0, 4))


@pytest.mark.parametrize("threads", [0, 3])
def test_a_state_is_json_and_gives_the_same_batches(threads):
    corpus = corpus_of(*[9] * 50)
    make = lambda: make_iterator(
        TrainRows(corpus, **ROWS), 4, num_threads=threads, prefetch=threads
    )
    iterator = make()
    for _ in range(5):  # 20 of 28 rows: in mid-epoch
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    following = [next(iterator) for _ in range(10)]
    resumed = make()
    next(resumed)
    resumed.set_state(state)
    for batch in following:
        np.testing.assert_array_equal(next(resumed), batch)
