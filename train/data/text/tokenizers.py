"""Tokenizers: bytes, byte-level BPE trained on the text, GPT-2's files, or any tokenizer.json.

A tokenizer lives in a run directory as tokenizer.json, in the format of the tokenizers library (for "bytes" a line of our
own), so that a checkpoint is read with the tokens it was trained on.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from train.data.text.words import CUT, Counts, Tokens, WordTable
from train.errors import UserError

END = "<|endoftext|>"  # of GPT-2 and of what is trained here
# What the end of a text is called in other people's files, the first that exists.
ENDS = (END, "</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_BYTES_JSON = b'{"type": "bytes"}\n'
_TRAINING_CHARACTERS = 200_000_000  # text from which BPE learns its merges; more changes little


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back.

    name: "bytes", "bpe", or the path it was read from.
    vocab_size: ids are below it.
    end: the id that stands before every document, as in GPT-2's training; no text is encoded to it.
    token_bytes: the UTF-8 bytes that each id stands for, 0 for special ones: over the ids of a text they sum to its
      bytes. None where ids do not stand for bytes (a normalizer, word pieces, sentence pieces).
    encode_batch: texts -> ids of each, int32, without `end`; what looks like a special token is ordinary text.
    decode: ids -> text; special ids and those of no token are left out, bytes that are not UTF-8 become U+FFFD.
    to_json: the content of tokenizer.json.
    can_cut: pieces cut at `train.data.text.words.CUT` have the ids of the whole.
    """

    name: str
    vocab_size: int
    end: int
    token_bytes: Int[np.ndarray, "vocab"] | None = field(repr=False)
    encode_batch: Callable[[Sequence[str]], list[Int32[np.ndarray, "_"]]] = field(repr=False)
    decode: Callable[[Any], str] = field(repr=False)
    to_json: Callable[[], bytes] = field(repr=False)
    can_cut: bool = False


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that config.data.tokenizer names: "bytes", a tokenizer.json, or a folder.

    A folder holds encoder.json and vocab.bpe (or vocab.json and merges.txt), GPT-2's files, or else a tokenizer.json.
    "bpe" is trained on the text and not found anywhere: see `train_bpe`.

    Raises:
      UserError: no such file, or not a tokenizer.
    """
    if spec == "bytes":
        return _bytes()
    path = Path(spec).expanduser()
    choices = "bytes, bpe, a tokenizer.json, or a folder with encoder.json and vocab.bpe"
    if path.is_dir():
        for vocab, merges in FILES:
            if (path / vocab).is_file() and (path / merges).is_file():
                return _gpt2(spec, path / vocab, path / merges)
        path /= "tokenizer.json"
    if not path.is_file():
        raise UserError(f"config.data.tokenizer: no {path}; give {choices}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"config.data.tokenizer: {path} cannot be read: {error.strerror}"
        ) from error
    return from_bytes(spec, content)


def from_bytes(name: str, content: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json, as `Tokenizer.to_json` or somebody else wrote it.

    Raises:
      UserError: not JSON, not a tokenizer, or one without a token for the end of a text.
    """
    from tokenizers import Tokenizer as Library

    try:
        data = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not JSON ({error}); give a tokenizer.json") from error
    if isinstance(data, dict) and data.get("type") == "bytes":
        return _bytes()
    try:
        library = Library.from_str(content.decode())
    except Exception as error:  # the library raises Exception itself
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is no tokenizer.json that can be read: {reason}") from error
    return _from_library(name, library)


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (GPT-2's pattern) of `vocab_size` tokens learned from the documents; the same ones, the same merges.

    Id 0 is <|endoftext|>, 1 to 256 are the bytes. A text with too few different words gives fewer tokens.

    Raises:
      UserError: vocab_size below 257.
    """
    if vocab_size < 257:
        raise UserError(
            f"config.model.vocab_size={vocab_size} is too small for bpe: 256 bytes and the end token need 257 or more"
        )
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_some(documents), trainer)
    return _from_library("bpe", library)


def _some(documents: Iterable[str]) -> Iterable[str]:
    """The first characters of the documents, in stretches of which many fit in memory."""
    left = _TRAINING_CHARACTERS
    for document in documents:
        if left <= 0:
            return
        start = 0
        while start < len(document):
            cut = CUT.search(document, min(start + 100_000, len(document)))
            stop = cut.start() if cut else len(document)
            yield document[start:stop]
            start = stop
        left -= len(document)


def _bytes() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 the end."""

    def encode_batch(texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(ids: Any) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode(errors="replace")

    token_bytes = np.append(np.ones(256, np.int32), np.int32(0))
    return Tokenizer(
        "bytes", 257, 256, token_bytes, encode_batch, decode, lambda: _BYTES_JSON, can_cut=True
    )


def _gpt2(name: str, vocab: Path, merges: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    try:
        library = Library(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises Exception itself
        reason = str(error).splitlines()[0]
        raise UserError(f"{vocab} and {merges.name} are not GPT-2's files: {reason}") from error
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if library.token_to_id(END) is not None:  # otherwise it would be given an id of its own
        library.add_special_tokens([END])
    return _from_library(name, library)


def _from_library(name: str, library: Any) -> Tokenizer:
    """A Tokenizer around one of the library, on the fast path where its words are GPT-2's."""
    special = {
        i: str(token) for i, token in library.get_added_tokens_decoder().items() if token.special
    }
    vocab = library.get_vocab(with_added_tokens=True)
    end = next((vocab[token] for token in ENDS if token in vocab), None)
    if end is None:
        raise UserError(
            f"tokenizer {name} has no token for the end of a text; one of its special tokens must be {', '.join(ENDS)}"
        )
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    spec = json.loads(library.to_str())
    vocab_size = max(vocab.values()) + 1

    def encode_batch(texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        encoded = library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def encode_words(words: list[str]) -> tuple[Tokens, Counts]:
        # one Encoding of all words, which says from which word a token is; encode_batch_fast does not say
        [encoding] = library.encode_batch([words], is_pretokenized=True, add_special_tokens=False)
        origins = np.array(encoding.word_ids, np.int64)
        return np.array(encoding.ids, np.int32), np.bincount(origins, minlength=len(words))

    def decode(ids: Any) -> str:
        known = [int(i) for i in ids if 0 <= int(i) < vocab_size and int(i) != end]
        return library.decode(known, skip_special_tokens=True)

    fast = _has_gpt2_words(spec)
    return Tokenizer(
        name=name,
        vocab_size=vocab_size,
        end=end,
        token_bytes=_token_bytes(vocab, {end, *special}) if _keeps_bytes(spec) else None,
        encode_batch=WordTable(encode_words).encode if fast else encode_batch,
        decode=decode,
        to_json=lambda: library.to_str().encode(),
        can_cut=fast,
    )


def _has_gpt2_words(spec: dict[str, Any]) -> bool:
    """Whether encoding is GPT-2's pattern, then something done with each word alone."""
    pre = spec["pre_tokenizer"] or {}
    model = spec["model"]
    return (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and spec["normalizer"] is None
        and pre.get("type") == "ByteLevel"
        and pre.get("use_regex", True)
        and not pre.get("add_prefix_space", True)
        and all(token["special"] for token in spec["added_tokens"])
    )


def _keeps_bytes(spec: dict[str, Any]) -> bool:
    """Whether the tokens are the bytes of the text, no more and no less: byte-level, nothing added, changed or removed."""
    pre = spec["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    return (
        spec["normalizer"] is None
        and len(byte_level) == 1
        and not byte_level[0].get("add_prefix_space", True)
        and all(
            step["type"] in ("ByteLevel", "Digits")
            or (step["type"] == "Split" and step.get("behavior") != "Removed")
            for step in steps
        )
        and not any(
            token["lstrip"] or token["rstrip"]
            for token in spec["added_tokens"]
            if not token["special"]
        )
        # a byte that has no token would vanish, or become <unk>
        and set(_byte_characters()) <= set(spec["model"].get("vocab", {}))
    )


def _byte_characters() -> list[str]:
    """The 256 characters by which byte-level tokenizers write the bytes."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def _token_bytes(vocab: dict[str, int], special: set[int]) -> Int[np.ndarray, "vocab"]:
    """A byte-level token has a character per byte; one that was added later is written as it is."""
    alphabet = set(_byte_characters())
    out = np.zeros(max(vocab.values()) + 1, np.int32)
    for token, i in vocab.items():
        if i not in special:
            out[i] = len(token) if alphabet.issuperset(token) else len(token.encode())
    return out
