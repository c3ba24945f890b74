"""Byte-level BPE several times as fast as the library alone: each different word goes through it once.

GPT-2's tokenizer cuts text into words by a regular expression and merges bytes within each. Here Python's `re` cuts, a
table remembers the tokens of every word met, and numpy lays them out; the library sees only words that are new.

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+        (Radford et al., 2019)

Python's `re` has no \\p{L}, its \\w and \\d are other sets and its \\s holds \\x1c ... \\x1f besides, so the classes are
spelled out. Where the library's Unicode tables and Python's may differ (characters that one of them does not know yet),
and for letters and digits beyond the basic plane, whose long lists of ranges are slow, the stretch between two places
where any text may be cut goes to the library whole.
"""

import functools
import itertools
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Int32, Int64

# Where a text may be cut without changing any word: before a space or a line break that follows a character that is not
# white space. No word goes on there, and none ends earlier because the text does: only white space looks ahead.
# (Python's \S leaves out \x1c ... \x1f, which GPT-2's does not: there is no cut behind these, which is allowed.)
CUT = re.compile(r"(?<=\S)(?=[ \n])")
Tokens: TypeAlias = Int32[np.ndarray, "tokens"]
Counts: TypeAlias = Int64[np.ndarray, "words"]

_WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's
# What is remembered before the table is begun anew: about 100 MB of short words; few where they are long.
_MOST_WORDS, _MOST_TOKENS = 1 << 19, 1 << 23


@functools.cache
def pattern() -> re.Pattern[str]:
    """GPT-2's pattern, right for text in which every character is `_sure`.

    Its first two alternatives have changed places, which changes no match (one begins with an apostrophe, the other
    never) and is faster.
    """
    letter, number = _ranges("L"), _ranges("N")
    return re.compile(
        rf" ?[{letter}]+|'(?:[stmd]|re|ve|ll)| ?[{number}]+| ?[^{_WHITE_SPACE}{letter}{number}]+"
        rf"|[{_WHITE_SPACE}]+(?![^{_WHITE_SPACE}])|[{_WHITE_SPACE}]+"
    )


def words(text: str) -> list[str]:
    """The words of a text, in order, which joined are the text; a stretch with an unsure character is one word."""
    if text.isascii() or all(map(_sure, set(text))):
        return pattern().findall(text)
    found: list[str] = []
    for stretch in CUT.split(text):
        found += pattern().findall(stretch) if all(map(_sure, set(stretch))) else [stretch]
    return found


class WordTable:
    """Encodes texts by words: `encode(texts)` gives the tokens of each.

    Args:
      encode_words: the library: words -> (tokens of all, how many of each).
    """

    def __init__(self, encode_words: Callable[[list[str]], tuple[Tokens, Counts]]):
        self._encode_words, self._lock = encode_words, threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._places = _Places()
        self._tokens = np.empty(0, np.int32)  # of all words, one after the other
        self._starts = np.zeros(1, np.int64)  # word i is _tokens[_starts[i] : _starts[i + 1]]

    def encode(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """The tokens of each text."""
        found: list[str] = []
        ends = []
        for text in texts:
            found += words(text)
            ends.append(len(found))
        with self._lock:
            # a place for every word: those that are new get the next ones, and are encoded together
            place = np.array(list(map(self._places.__getitem__, found)), np.int64)
            self._learn()
            starts = self._starts[place]
            lengths = self._starts[place + 1] - starts
            stops = np.cumsum(lengths)
            total = int(stops[-1]) if len(stops) else 0
            # out[i] = tokens[start of i's word + i - where that word begins in out]
            tokens = self._tokens[np.repeat(starts - stops + lengths, lengths) + np.arange(total)]
            if len(self._places) > _MOST_WORDS or len(self._tokens) > _MOST_TOKENS:
                self._clear()
        stops = np.concatenate([np.zeros(1, np.int64), stops])[np.array(ends, np.int64)]
        return np.split(tokens, stops[:-1]) if len(texts) else []

    def _learn(self) -> None:
        """Encodes the words that came new."""
        new, self._places.new = self._places.new, []
        if not new:
            return
        try:
            tokens, counts = self._encode_words(new)
        except BaseException:  # Ctrl-C: words without tokens must not stay
            self._clear()
            raise
        self._tokens = np.concatenate([self._tokens, tokens])
        self._starts = np.concatenate([self._starts, self._starts[-1] + np.cumsum(counts)])


class _Places(dict[str, int]):
    """word -> its place, the next free one for a word that is new."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self[word] = place = len(self)
        self.new.append(word)
        return place


@functools.lru_cache(1 << 17)
def _sure(character: str) -> bool:
    """Whether every version of Unicode puts a character in the same of the pattern's classes as Python's.

    Sure are letters and numbers that were so in Unicode 3.2 already, on the basic plane, and assigned characters that are
    neither. The others: unassigned for Python, or perhaps for the library.
    """
    category = unicodedata.category(character)
    if category[0] in "LN":
        return character < "\U00010000" and (
            unicodedata.ucd_3_2_0.category(character)[0] == category[0]
        )
    return category != "Cn"


def _ranges(kind: str) -> str:
    """The characters of the basic plane whose general category begins with `kind`, as the inside of a bracket."""
    members = [i for i in range(0x10000) if unicodedata.category(chr(i))[0] == kind]
    breaks = [i for i, (a, b) in enumerate(itertools.pairwise(members), 1) if b != a + 1]
    edges = [0, *breaks, len(members)]
    return "".join(
        f"\\u{members[a]:04x}-\\u{members[b - 1]:04x}" for a, b in itertools.pairwise(edges)
    )
