"""Tokenizers: text comes back, bytes add up, and the fast path gives the library's own tokens."""

import json
import pathlib
import random
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from train.data.text.tokenizers import END, Tokenizer, from_bytes, load_tokenizer, train_bpe
from train.data.text.words import CUT, pattern, words
from train.errors import UserError

DATA = pathlib.Path(__file__).resolve().parents[3] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")

SAMPLE = (
    "It's 9 o'clock; they'll say \"we're\"...  \n\n\tnaïve  café \r\n  日本語 123４５ ⅷ ²\U0001f600\x1c x\u00a0y "
    f"{END} don't I'D\u2028 \u0345ͅ ʼn'sx '' ' 'd\n"
)
# every plane, and what a pattern stumbles over: quotes, spaces of all kinds, numerals that are no digits, joiners, ends
TEXT = st.text(
    st.one_of(
        st.sampled_from(
            "abs trevmld'  \n\t\r\x0b\x1c\x1d\x85\u00a0\u2028\u3000\u180e\u200b٣²Ⅷ㊿ªʰé日\u0301_<|>"
        ),
        st.characters(exclude_categories=("Cs",)),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([SAMPLE * 3, "the cat sat on the mat. " * 20], 340)


@pytest.fixture(scope="module")
def library(bpe):
    plain = Library.from_str(bpe.to_json().decode())
    plain.encode_special_tokens = True
    return lambda text: plain.encode(text, add_special_tokens=False).ids


def test_bytes_are_the_bytes():
    tokenizer = load_tokenizer("bytes")
    [ids, empty] = tokenizer.encode_batch(["aé", ""])
    assert ids.tolist() == [97, 0xC3, 0xA9]
    assert empty.tolist() == []
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)
    assert tokenizer.decode([256, 97, 0xC3, 0xA9, 256, 0xC3, -1, 400]) == "aé\ufffd"
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [0]
    assert from_bytes("x", tokenizer.to_json()).name == "bytes"


@given(TEXT)
@settings(max_examples=300)
def test_words_are_the_pattern_of_the_library(bpe, library, text):
    assert "".join(words(text)) == text
    assert bpe.encode_batch([text])[0].tolist() == library(text)


@given(TEXT)
@settings(max_examples=200)
def test_every_cut_keeps_the_tokens(bpe, text):
    cut = CUT.split(text)
    whole, *parts = bpe.encode_batch([text, *cut])
    assert np.concatenate(parts).tolist() == whole.tolist()


@given(TEXT)
@settings(max_examples=100)
def test_text_comes_back_and_its_bytes_add_up(bpe, text):
    for tokenizer in (bpe, load_tokenizer("bytes")):
        [ids] = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_letters_of_the_library_are_letters_of_the_pattern():
    """Some of Unicode, as ByteLevel classifies it: "a" + letter, "1" + number, "!" + other stay one word."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    points = random.Random(0).sample(range(0x80, sys.maxunicode + 1), 50_000)
    characters = [chr(p) for p in points if unicodedata.category(chr(p)) != "Cs"]
    text = "".join(f"a{c}1{c}!{c}\n" for c in characters)
    expected = [text[start:stop] for _, (start, stop) in byte_level.pre_tokenize_str(text)]
    ours: list[str] = []
    for stretch in words(text):  # a stretch that goes to the library whole is cut by it
        whole = pattern().fullmatch(stretch) and len(pattern().findall(stretch)) == 1
        parts = byte_level.pre_tokenize_str(stretch)
        ours += [stretch] if whole else [stretch[a:b] for _, (a, b) in parts]
    assert ours == expected


def test_what_looks_like_the_end_is_text(bpe):
    [ids] = bpe.encode_batch([f"a{END}b"])
    assert bpe.end not in ids
    assert len(ids) > 3
    assert bpe.decode(ids) == f"a{END}b"
    assert bpe.decode([bpe.end, *ids, bpe.end, 10**6, -1]) == f"a{END}b"


def test_training_is_deterministic_and_the_file_gives_the_same_tokens(bpe):
    again = train_bpe([SAMPLE * 3, "the cat sat on the mat. " * 20], 340)
    assert again.to_json() == bpe.to_json()
    assert (bpe.vocab_size, bpe.end) == (340, 0)
    back = from_bytes("bpe", bpe.to_json())
    assert back.to_json() == bpe.to_json()
    np.testing.assert_array_equal(back.encode_batch([SAMPLE])[0], bpe.encode_batch([SAMPLE])[0])
    assert (back.end, back.vocab_size, back.can_cut) == (0, 340, True)
    assert train_bpe(["ab"], 300).vocab_size < 300


def test_the_table_of_words_is_begun_anew_when_full(bpe, library, monkeypatch):
    monkeypatch.setattr("train.data.text.words._MOST_WORDS", 5)
    for text in (SAMPLE, "one two three four five six seven", SAMPLE, "one"):
        assert bpe.encode_batch([text, ""])[0].tolist() == library(text)


def little_library(**parts) -> Library:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Library(
        models.BPE({**vocab, "ab": 256, "Ġab": 257, "</s>": 258}, [("a", "b"), ("Ġ", "ab")])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    for name, value in parts.items():
        setattr(made, name, value)
    return made


def test_other_tokenizers_go_through_the_library():
    plain = from_bytes("x", little_library().to_str().encode())
    assert (plain.end, plain.can_cut, plain.vocab_size) == (258, True, 259)
    assert plain.encode_batch(["ab ab"])[0].tolist() == [256, 257]
    lower = little_library(normalizer=normalizers.Lowercase())
    digits = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    split = little_library(pre_tokenizer=pre_tokenizers.Sequence(digits))
    prefix = little_library(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    added = little_library()
    added.add_tokens(["abba"])
    for made, keeps_bytes in ((lower, False), (split, True), (prefix, False), (added, True)):
        made.encode_special_tokens = True
        tokenizer = from_bytes("x", made.to_str().encode())
        assert not tokenizer.can_cut
        for text in ("AB ab 12 abba</s>", SAMPLE):
            [ids] = tokenizer.encode_batch([text])
            assert ids.tolist() == made.encode(text, add_special_tokens=False).ids
            if keeps_bytes:
                assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert (tokenizer.token_bytes is not None) == keeps_bytes


def test_files_that_are_no_tokenizer(tmp_path):
    def refused(spec, content=None):
        with pytest.raises(UserError) as caught:
            load_tokenizer(spec) if content is None else from_bytes(spec, content)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "give bytes, bpe, a tokenizer.json" in refused(str(tmp_path / "none.json"))
    assert "tokenizer.json" in refused(str(tmp_path))
    assert "is not JSON" in refused("t", b"{")
    assert "no tokenizer.json that can be read" in refused("t", b'{"version": 1}')
    no_end = json.loads(little_library().to_str())
    no_end["model"]["vocab"].pop("</s>")
    assert "no token for the end" in refused("t", json.dumps(no_end).encode())
    (tmp_path / "encoder.json").write_text("{")
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    assert "not GPT-2's files" in refused(str(tmp_path))
    with pytest.raises(UserError, match="257 or more"):
        train_bpe(["x"], 256)


@needs_data
def test_gpt2_on_real_text():
    tokenizer = load_tokenizer(str(DATA / "vocab_gpt2"))
    assert (tokenizer.vocab_size, tokenizer.end) == (50257, 50256)
    assert tokenizer.encode_batch(["Hello world"])[0].tolist() == [15496, 995]
    plain = Library.from_str(tokenizer.to_json().decode())
    for name, encoding in (
        ("tinyshakespeare/input.txt", "utf-8"),
        ("wikitext2/test.txt", "utf-8"),
        ("dickens/dickens.txt", "latin-1"),
    ):
        text = (DATA / name).read_text(encoding=encoding)[:300_000]
        [ids] = tokenizer.encode_batch([text])
        assert ids.tolist() == plain.encode(text).ids
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids) == text
