"""The registry of sequence mixers: a name, and the Linen module that obeys the causal contract (docs/mixers.md).

A new mixer is one file in this folder and one line here; the law of tests/jaxmodels/mixers/test_law.py finds it through
this dict.
"""

from flax import linen as nn

from jaxmodels.mixers.attention import Attention
from jaxmodels.mixers.base_conv import BaseConv
from jaxmodels.mixers.based import Based
from jaxmodels.mixers.hyena import Hyena
from jaxmodels.mixers.sliding_window import SlidingWindow

MIXERS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "sliding_window": SlidingWindow,
    "based": Based,
    "base_conv": BaseConv,
    "hyena": Hyena,
}
