"""Text for language models: sources, tokenizers, tokens on disk, packed rows, iterators of batches.

sources.resolve -> cache.tokenizer_of -> cache.tokens_of -> rows.split, rows.TrainRows -> loader.make_iterator
"""

from train.data.text.cache import Corpus as Corpus
from train.data.text.cache import check_ids as check_ids
from train.data.text.cache import tokenizer_of as tokenizer_of
from train.data.text.cache import tokens_of as tokens_of
from train.data.text.loader import make_iterator as make_iterator
from train.data.text.readers import documents as documents
from train.data.text.rows import PADDING as PADDING
from train.data.text.rows import TrainRows as TrainRows
from train.data.text.rows import held_out_rows as held_out_rows
from train.data.text.rows import split as split
from train.data.text.sources import Source as Source
from train.data.text.sources import resolve as resolve
from train.data.text.tokenizers import Tokenizer as Tokenizer
from train.data.text.tokenizers import from_bytes as from_bytes
from train.data.text.tokenizers import load_tokenizer as load_tokenizer
from train.data.text.tokenizers import train_bpe as train_bpe
