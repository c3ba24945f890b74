"""Rows of fixed length packed from documents; which row comes when is a function of (seed, index) alone.

An epoch lays all documents on a circle in an order of its own, cuts the circle into rows from a random place on, and visits
the rows in a random order. Nothing is padded and nothing is lost but a remainder shorter than a row, another one each time.
No state but the index of the next row needs to be kept: that is what makes a resumed run exact.
"""

import math
import threading
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from train.data.text.cache import Corpus
from train.errors import UserError

PADDING = -1  # where a held-out row has no label


class TrainRows:
    """Endless rows of length + 1 tokens: a row is the inputs [:-1] and the labels [1:].

    Row i belongs to epoch i // per_epoch. The generator of an epoch is Philox with the key (seed, epoch). Safe to call from
    several threads; the orders of the last two epochs are kept (8 bytes a document and a row).

    Args:
      length: tokens of a row, without the one more.
      seed: of the orders, in [0, 2^64).

    Raises:
      UserError: fewer than length + 1 tokens.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int):
        total = len(corpus.tokens)
        if total < length + 1:
            raise UserError(
                f"the training text has {total} tokens, a row of config.data.length={length} needs {length + 1}; "
                "give more text, or a smaller length"
            )
        self.length, self.per_epoch, self._seed = length, total // length, seed
        self._corpus = corpus
        self._sizes = np.diff(corpus.starts, append=total)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def row(self, index: int) -> Int32[np.ndarray, "tokens"]:
        """Row `index` of the endless sequence, int32[length + 1]."""
        number, place = divmod(index, self.per_epoch)
        epoch = self._epoch(number)
        total, tokens = len(self._corpus.tokens), self._corpus.tokens
        position = (epoch.offset + int(epoch.rows[place]) * self.length) % total
        out = np.empty(self.length + 1, np.int32)
        filled = 0
        k = int(np.searchsorted(epoch.ends, position, side="right"))  # the k-th on the circle
        while filled < len(out):
            document = epoch.documents[k]
            left = int(epoch.ends[k]) - position
            start = int(self._corpus.starts[document] + self._sizes[document]) - left
            taken = min(left, len(out) - filled)
            out[filled : filled + taken] = tokens[start : start + taken]
            filled += taken
            position += taken
            k += 1
            if k == len(epoch.ends):
                k = position = 0
        return out

    def _epoch(self, number: int) -> "_Epoch":
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = self._draw(number)
                while len(self._epochs) > 2:  # the oldest to come in
                    del self._epochs[next(iter(self._epochs))]
            return self._epochs[number]

    def _draw(self, number: int) -> "_Epoch":
        random = np.random.Generator(np.random.Philox(key=[self._seed, number]))
        documents = random.permutation(len(self._sizes))
        return _Epoch(
            documents=documents,
            ends=np.cumsum(self._sizes[documents]),
            offset=int(random.integers(len(self._corpus.tokens))),
            rows=random.permutation(self.per_epoch),
        )


@dataclass(frozen=True, eq=False)
class _Epoch:
    """documents: their order on the circle. ends: where each ends there. offset: where row 0 begins. rows: their order."""

    documents: Int64[np.ndarray, "docs"]
    ends: Int64[np.ndarray, "docs"]
    offset: int
    rows: Int64[np.ndarray, "rows"]


def held_out_rows(
    corpus: Corpus, length: int
) -> tuple[Int32[np.ndarray, "n row"], Int32[np.ndarray, "n"]]:
    """Consecutive rows of length + 1 tokens in which every token after the first is a label exactly once.

    Row r holds the tokens r * length ... (r + 1) * length: its last label is the next row's first input. The last row is
    filled up with PADDING.

    Returns: the rows and how many labels each has.

    Raises:
      UserError: fewer than two tokens.
    """
    total = len(corpus.tokens)
    if total < 2:
        raise UserError(f"the text to evaluate on has {total} tokens; give at least 2")
    n = math.ceil((total - 1) / length)
    out = np.full((n, length + 1), PADDING, np.int32)
    whole = (total - 1) // length
    out[:whole, :-1] = corpus.tokens[: whole * length].reshape(whole, length)
    out[:whole, -1] = corpus.tokens[length : whole * length + 1 : length]
    if whole < n:
        rest = corpus.tokens[whole * length :]
        out[whole, : len(rest)] = rest
    return out, np.count_nonzero(out[:, 1:] != PADDING, axis=1).astype(np.int32)


def split(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """(training, held out): the last `fraction` of the tokens is held out.

    The cut moves to the nearest start of a document where there is one within a tenth of the held-out size; otherwise it
    goes through a document.

    Raises:
      UserError: a fraction outside (0, 1), or so little text that a side would have fewer than two tokens.
    """
    if not 0 < fraction < 1:
        raise UserError(
            f"config.data.held_out must be between 0 and 1, got {fraction}; or set config.data.validation_path"
        )
    total = len(corpus.tokens)
    size = round(total * fraction)
    cut = total - size
    nearest = int(corpus.starts[np.argmin(np.abs(corpus.starts - cut))])
    if abs(nearest - cut) <= size / 10:
        cut = nearest
    if min(cut, total - cut) < 2:
        raise UserError(
            f"the text has {total} tokens, of which config.data.held_out={fraction} leaves {cut} to train on and "
            f"{total - cut} to evaluate on; give more text"
        )
    first = int(np.searchsorted(corpus.starts, cut))
    after = corpus.starts[first:] - cut
    if not len(after) or after[0]:
        after = np.concatenate([np.zeros(1, np.int64), after])
    return Corpus(corpus.tokens[:cut], corpus.starts[:first]), Corpus(corpus.tokens[cut:], after)
