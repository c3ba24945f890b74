"""Who learns associative recall at width 64, over three seeds: MQAR, 64 tokens, 4 pairs, vocabulary 8,192.

Attention and BASED (f = 16) behind a short gated convolution, two BaseConv layers (a filter of 3, then one as long as the
sequence), two Hyena layers. Initialisation, weight decay and data are Zoology's; training is reduced to 1,000 steps of 256
where the papers take 12,500 of 512 at the best of four learning rates.

Command:  python -m train --config mqar/learning --workdir runs/learning
Expected: attention at least .99, BASED at least .95, BaseConv and Hyena far below (docs/results.md)
Time:     about 10 minutes on 2 CPU cores; the same command goes on where it was stopped
"""

from train.config import base_config

SHORT_CONV = {"name": "base_conv", "kernel_size": 3}
MIXERS = {
    "attention": [SHORT_CONV, {"name": "attention", "dropout": 0.1}],
    "based": [SHORT_CONV, {"name": "based", "feature_dim": 16, "out_range": 0.02}],
    "base_conv": [SHORT_CONV, {"name": "base_conv", "kernel_size": -1, "max_len": 64}],
    "hyena": [{"name": "hyena", "max_len": 64}],
}
SLOW = {"learning_rate": 3e-3}


def get_config():
    config = base_config()
    config.steps = 1000
    config.batch_size = 256
    config.learning_rate = 1e-2
    config.optimizer.warmup_steps = 50
    config.data.random_non_queries = False
    config.eval.every_steps = 250
    config.eval.stop_metric = "eval/accuracy"
    config.eval.stop_value = 0.995
    config.runs = tuple(
        {
            "name": f"{name}-seed{seed}",
            "seed": seed,
            "model.mixers": mixers,
            **(SLOW if name in ("base_conv", "hyena") else {}),
        }
        for seed in (0, 1, 2)
        for name, mixers in MIXERS.items()
    )
    return config
