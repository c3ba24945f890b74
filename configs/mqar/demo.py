"""Five mixers on associative recall, and the picture of the papers: recall against the bytes a model remembers.

Attention solves it with a state that grows with the sequence, BASED with one that does not, and the larger its state the
more it recalls. A sliding window recalls what lies inside it. The gated convolution and Hyena do not at this width.

MQAR with 64 tokens and 4 pairs as in the papers; a vocabulary of 1,024 instead of 8,192 and initial weights of .05 instead
of .02 shorten the plateau before recall sets in, so that the figure takes minutes on a CPU.

Command:  python -m train --config mqar/demo --workdir runs/demo      (or: make demo)
Expected: runs/demo/plots/recall_memory.png and a table with the same numbers
Time:     two and a half minutes on 2 CPU cores
"""

from train.config import base_config

SHORT_CONV = {"name": "base_conv", "kernel_size": 3}
LONG_CONV = {"name": "base_conv", "kernel_size": -1, "max_len": 64}


def get_config():
    config = base_config()
    config.steps = 900
    config.batch_size = 128
    config.learning_rate = 1e-2
    config.optimizer.warmup_steps = 50
    config.model.vocab_size = 1024
    config.model.initializer_range = 0.05
    config.model.embed_dropout = 0.0
    config.data.train = ({"length": 64, "num_kv_pairs": 4, "num_examples": None},)
    config.data.test = ({"length": 64, "num_kv_pairs": 4, "num_examples": 2000},)
    config.data.random_non_queries = False
    config.eval.stop_metric = "eval/accuracy"
    config.eval.stop_value = 0.995
    config.plot = "recall_memory"
    config.runs = (
        {"name": "attention", "model.mixers": [SHORT_CONV, {"name": "attention"}]},
        *(hybrid("sliding_window", window=w) for w in (8, 16, 32)),
        *(hybrid("based", feature_dim=f) for f in (2, 4, 16)),
        {"name": "base_conv", "model.mixers": [SHORT_CONV, LONG_CONV]},
        {"name": "hyena", "model.mixers": [{"name": "hyena", "max_len": 64}]},
    )
    return config


def hybrid(mixer, **fields):
    """A run of [short convolution, mixer], named after the mixer and its size."""
    (size,) = fields.values()
    return {"name": f"{mixer}_{size}", "model.mixers": [SHORT_CONV, {"name": mixer, **fields}]}
