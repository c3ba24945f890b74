"""The tokens on disk: what is in them, when they are made again, and who may make them at once."""

import dataclasses
import json
import os
import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from train.data.text import cache, check_ids, load_tokenizer, resolve, tokenizer_of, tokens_of
from train.data.text.progress import progress
from train.data.text.tokenizers import Tokenizer
from train.errors import UserError

END = 256
DOCUMENTS = ["first é", " second\n", "third " * 50]


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": d}) for d in DOCUMENTS))
    return path


def expected(documents=DOCUMENTS) -> list[int]:
    return [token for d in documents for token in [END, *d.encode()]]


def load(file, folder, tokenizer=None):
    return tokens_of(resolve(str(file)), tokenizer or load_tokenizer("bytes"), folder)


def counting(tokenizer: Tokenizer) -> tuple[Tokenizer, list[int]]:
    """The tokenizer, and the number of texts of every call to it."""
    calls: list[int] = []

    def encode_batch(texts):
        calls.append(len(texts))
        return tokenizer.encode_batch(texts)

    return dataclasses.replace(tokenizer, encode_batch=encode_batch), calls


def test_documents_one_after_the_other_with_the_end_before_each(file, tmp_path):
    corpus = load(file, tmp_path / "cache")
    assert corpus.tokens.tolist() == expected()
    assert corpus.tokens.dtype == np.uint16
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.starts.tolist() == [0, 9, 18]
    assert np.flatnonzero(corpus.tokens == END).tolist() == [0, 9, 18]


@pytest.mark.parametrize("batch", [1, 10, 1 << 20])
def test_pieces_and_batches_leave_no_trace(tmp_path, monkeypatch, batch):
    """A text read in small blocks, cut where words begin, has the tokens of the text as a whole."""
    text = "It's  a\n\n  test of 'cuts'\r\n in naïve text \n" * 20
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    source = resolve(str(path))
    tokenizer = tokenizer_of("bpe", source, 300, tmp_path)
    monkeypatch.setattr("train.data.text.readers.BLOCK", 37)
    monkeypatch.setattr("train.data.text.cache._BATCH", batch)
    corpus = tokens_of(source, tokenizer, tmp_path)
    assert corpus.tokens.tolist() == [tokenizer.end, *tokenizer.encode_batch([text])[0]]
    assert corpus.starts.tolist() == [0]


def test_it_is_made_once_and_again_when_anything_changes(file, tmp_path):
    folder = tmp_path / "cache"
    tokenizer, calls = counting(load_tokenizer("bytes"))
    for _ in range(3):
        load(file, folder, tokenizer)
    assert calls == [3]
    os.utime(file, ns=(1, 1))
    load(file, folder, tokenizer)
    assert calls == [3, 3]
    tokens_of(resolve(str(file), errors="replace"), tokenizer, folder)
    assert calls == [3, 3, 3]
    bpe = tokenizer_of("bpe", resolve(str(file)), 300, folder)
    assert load(file, folder, bpe).tokens[0] == bpe.end
    assert len([p for p in folder.iterdir() if p.name.startswith("text-")]) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "tokens.bin").write_bytes(b"123"),
        lambda entry: (entry / "meta.json").write_text("{"),
        lambda entry: (entry / "starts.npy").unlink(),
        lambda entry: np.save(entry / "starts.npy", np.array([1, 2, 3])),
    ],
)
def test_a_damaged_entry_is_made_again(file, tmp_path, damage, caplog):
    folder = tmp_path / "cache"
    load(file, folder)
    [entry] = folder.iterdir()
    damage(entry)
    tokenizer, calls = counting(load_tokenizer("bytes"))
    assert load(file, folder, tokenizer).tokens.tolist() == expected()
    assert load(file, folder, tokenizer).tokens.tolist() == expected()
    assert calls == [3]
    assert "again" in caplog.text
    assert list(folder.iterdir()) == [entry]


def test_nothing_is_left_of_a_failure(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good text\n\xff")
    with pytest.raises(UserError, match="byte 10 "):
        load(path, tmp_path / "cache")
    path.write_bytes(b" \n ")
    with pytest.raises(UserError, match="holds no text"):
        load(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_directory_that_cannot_be_written_costs_a_warning(file, tmp_path, caplog):
    (tmp_path / "no").write_text("a file")
    assert load(file, tmp_path / "no" / "cache").tokens.tolist() == expected()
    assert "cannot keep the tokens" in caplog.text
    source = resolve(str(file))
    assert tokenizer_of("bpe", source, 300, tmp_path / "no" / "cache").name == "bpe"


def test_a_full_disk_is_one_line(file, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left.*cache_dir"):
        load(file, tmp_path / "cache")


def test_leftovers_of_killed_processes_go_after_a_day(file, tmp_path):
    folder = tmp_path / "cache"
    for name in ("old", "new"):
        (folder / f".text-being-made-{name}").mkdir(parents=True)
    os.utime(folder / ".text-being-made-old", (1, 1))
    load(file, folder)
    assert [p.name for p in folder.glob(".*")] == [".text-being-made-new"]


def test_several_at_once(file, tmp_path):
    """Threads, all of which find nothing and make it; to the folder they are as good as processes."""
    barrier = threading.Barrier(8)

    def make(_):
        source = resolve(str(file))
        barrier.wait()
        return tokens_of(source, load_tokenizer("bytes"), tmp_path / "cache").tokens.tolist()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(8))) == [expected()] * 8
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_npy_files_are_their_own_tokens(tmp_path):
    first, second = np.array([5, 0, 7, 0, 9], np.uint16), np.array([1, 70000, 0], np.int32)
    np.save(tmp_path / "a.npy", first)
    np.save(tmp_path / "b.npy", second)
    text = tmp_path / "t.txt"
    text.write_text("some text")
    bpe = tokenizer_of("bpe", resolve(str(text)), 300, tmp_path)
    assert bpe.end == 0

    one = load(tmp_path / "a.npy", tmp_path / "cache")
    assert isinstance(one.tokens, np.memmap)
    assert one.starts.tolist() == [0]
    assert load(tmp_path / "a.npy", tmp_path / "cache", bpe).starts.tolist() == [0, 1, 3]
    assert not (tmp_path / "cache").exists()

    both = load(tmp_path / "*.npy", tmp_path / "cache", bpe)
    assert both.tokens.tolist() == [5, 0, 7, 0, 9, 1, 70000, 0]
    assert both.starts.tolist() == [0, 1, 3, 5, 7]
    with pytest.raises(UserError, match="no bpe can be trained"):
        tokenizer_of("bpe", resolve(str(tmp_path / "a.npy")), 300, tmp_path)

    check_ids(both, 70001)
    with pytest.raises(UserError, match=r"token 70000 at position 6.*vocab_size"):
        check_ids(both, 300)


def test_a_trained_tokenizer_is_kept(file, tmp_path, monkeypatch):
    source = resolve(str(file))
    first = tokenizer_of("bpe", source, 300, tmp_path / "cache")
    monkeypatch.setattr(cache, "train_bpe", lambda *args: pytest.fail("trained again"))
    assert tokenizer_of("bpe", source, 300, tmp_path / "cache").to_json() == first.to_json()
    assert tokenizer_of("bytes", source, 300).name == "bytes"


def test_progress_is_silent_at_first_and_then_a_line(file, capsys, monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 7.0, 13.0])
    monkeypatch.setattr("train.data.text.progress.time.monotonic", lambda: next(clock))
    with progress(resolve(str(file)), "tokenising") as tick:
        for _ in range(4):
            tick(1_500_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"tokenising {file}: 3 MB so far, 0.5 MB/s",
        f"tokenising {file}: 6 MB so far, 0.5 MB/s",
    ]
