"""Who learns associative recall at width 64, over three seeds: MQAR, 64 tokens, 4 pairs, vocabulary 8,192.

Attention and BASED (f = 16) behind a short gated convolution, two BaseConv layers (a filter of 3, then one as long as the
sequence), two Hyena layers. Initialisation, weight decay, the 100,000 examples and the schedule are Zoology's, at one of its
four learning rates. Its 12,500 steps of 512 are reduced: 1,000 of 256 for attention and BASED, which need no more; 6,000 of
512 for BaseConv, which leaves the plateau of guessing among the row's four values (.25) after 2,250 to 4,250; 3,000 of 512 for
Hyena.

Command:  python -m train --config mqar/learning --workdir runs/learning
Expected: attention at least .99, BASED at least .95, BaseConv .28 to .46, Hyena about .55 (docs/results.md)
Time:     about an hour and a half on 2 CPU cores; the same command goes on where it was stopped
"""

from train.config import base_config

SHORT_CONV = {"name": "base_conv", "kernel_size": 3}
MIXERS = {
    "attention": [SHORT_CONV, {"name": "attention", "dropout": 0.1}],
    "based": [SHORT_CONV, {"name": "based", "feature_dim": 16, "out_range": 0.02}],
    "base_conv": [SHORT_CONV, {"name": "base_conv", "kernel_size": -1, "max_len": 64}],
    "hyena": [{"name": "hyena", "max_len": 64}],
}
LONG = {"batch_size": 512, "optimizer.schedule": "cosine_per_epoch", "optimizer.warmup_steps": 0}
STEPS = {"base_conv": 6000, "hyena": 3000}


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
            **({**LONG, "steps": STEPS[name]} if name in STEPS else {}),
        }
        for seed in (0, 1, 2)
        for name, mixers in MIXERS.items()
    )
    return config
