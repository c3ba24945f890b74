"""A gated convolution alone does not recall at width 64: MQAR, 64 tokens, 4 key-value pairs.

Two layers of BaseConv, one with a short filter (3) and one with a filter as long as the sequence, as in Zoology's figure 2
(arXiv 2312.04927): .70 at width 64, 1.00 only at width 512.

Command:  python -m train --config mqar/base_conv --workdir runs/base_conv
Expected: eval/accuracy .25 after these 2,000 steps (a guess among the four values of the row); .70 is after 12,500 of 512
Time:     about 2 minutes on 2 CPU cores
"""

from train.config import base_config


def get_config():
    config = base_config()
    config.steps = 2000
    config.batch_size = 256
    config.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.model.mixers = [
        {"name": "base_conv", "kernel_size": 3},
        {"name": "base_conv", "kernel_size": -1, "max_len": 64},
    ]
    config.data.random_non_queries = False
    return config
