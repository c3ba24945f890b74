"""Hyena does not recall at width 64: MQAR, 64 tokens, 4 key-value pairs.

Two layers of Hyena (gates around an implicit long convolution), as in Zoology's figure 2 (arXiv 2312.04927): .52 at width
64, .86 at width 512.

Command:  python -m train --config mqar/hyena --workdir runs/hyena
Expected: eval/accuracy about .2 after these 2,000 steps; .52 is after 12,500 of 512
Time:     about 4 minutes on 2 CPU cores
"""

from train.config import base_config


def get_config():
    config = base_config()
    config.steps = 2000
    config.batch_size = 256
    config.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.model.mixers = [{"name": "hyena", "max_len": 64}]
    config.data.random_non_queries = False
    return config
