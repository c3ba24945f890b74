"""BASED recalls from a state of fixed size: MQAR, 64 tokens, 4 key-value pairs.

A short gated convolution and then linear attention with the second-order Taylor map, feature width 16 (arXiv 2402.18668).
No positions. State by the papers' count: 40,548 bytes, whatever the length.

Command:  python -m train --config mqar/based --workdir runs/based
Expected: eval/accuracy at least .95
Time:     about a minute on 2 CPU cores
"""

from train.config import base_config


def get_config():
    config = base_config()
    config.steps = 1000
    config.batch_size = 256
    config.learning_rate = 1e-2
    config.optimizer.warmup_steps = 50
    config.model.mixers = [
        {"name": "base_conv", "kernel_size": 3},
        {"name": "based", "feature_dim": 16, "out_range": 0.02},
    ]
    config.data.random_non_queries = False
    config.eval.stop_metric = "eval/accuracy"
    config.eval.stop_value = 0.995
    return config
