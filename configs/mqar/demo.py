"""Five mixers on associative recall, and the picture of the papers: recall against the bytes a model remembers.

Attention and a large enough BASED state solve it; the sliding window only in proportion to its window; the gated
convolution and Hyena do not at this width. A small vocabulary and width, so that the whole figure takes minutes.

Command:  python -m train --config mqar/demo --workdir runs/demo      (or: make demo)
Expected: runs/demo/plots/recall_memory.png and a table with the same numbers
Time:     under 6 minutes on 2 CPU cores
"""

from train.config import base_config

SHORT_CONV = {"name": "base_conv", "kernel_size": 3}


def get_config():
    config = base_config()
    config.steps = 1000
    config.batch_size = 128
    config.learning_rate = 5e-3
    config.optimizer.warmup_steps = 50
    config.model.vocab_size = 256
    config.model.d_model = 32
    config.data.train = ({"length": 64, "num_kv_pairs": 8, "num_examples": None},)
    config.data.test = ({"length": 64, "num_kv_pairs": 8, "num_examples": 1000},)
    config.data.random_non_queries = False
    config.eval.stop_metric = "eval/accuracy"
    config.eval.stop_value = 0.99
    config.plot = "recall_memory"
    config.runs = (
        {"name": "attention", "model.mixers": [{"name": "attention"}], "model.max_positions": 64},
        *(hybrid("sliding_window", window=w) for w in (8, 16, 32)),
        *(hybrid("based", feature_dim=f) for f in (4, 8, 16)),
        {"name": "base_conv", "model.mixers": [SHORT_CONV, {**SHORT_CONV, "kernel_size": -1}]},
        {"name": "hyena", "model.mixers": [{"name": "hyena"}]},
    )
    return config


def hybrid(mixer, **fields):
    """A run of [short convolution, mixer], named after the mixer and its size."""
    (size,) = fields.values()
    return {"name": f"{mixer}_{size}", "model.mixers": [SHORT_CONV, {"name": mixer, **fields}]}
