"""Softmax attention solves associative recall: MQAR, 64 tokens, 4 key-value pairs.

A short gated convolution and then one-head attention of width 64 without positions, the recipe of BASED's figure 2 (arXiv
2402.18668), whose value is 1.00. State by the papers' count: 525,056 bytes at length 1,024, growing with the length.

Command:  python -m train --config mqar/attention --workdir runs/attention
Expected: eval/accuracy at least .99
Time:     under a minute on 2 CPU cores
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
        {"name": "attention", "dropout": 0.1},
    ]
    config.data.random_non_queries = False
    config.eval.stop_metric = "eval/accuracy"
    config.eval.stop_value = 0.995
    return config
