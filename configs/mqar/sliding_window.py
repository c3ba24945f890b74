"""A sliding window recalls only what it still sees: MQAR, 64 tokens, 4 key-value pairs.

A short gated convolution and then attention over the last 16 keys. Most queries ask for pairs further back than that, so
accuracy follows the window: `--config.model.mixers[1].window=32` gives more.

Command:  python -m train --config mqar/sliding_window --workdir runs/sliding_window
Expected: eval/accuracy far below attention's, growing with the window
Time:     about 2 minutes on 2 CPU cores
"""

from train.config import base_config


def get_config():
    config = base_config()
    config.steps = 1500
    config.batch_size = 256
    config.learning_rate = 1e-2
    config.optimizer.warmup_steps = 50
    config.model.mixers = [
        {"name": "base_conv", "kernel_size": 3},
        {"name": "sliding_window", "window": 16},
    ]
    config.data.random_non_queries = False
    return config
