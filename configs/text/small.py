"""A hybrid of gated convolutions, BASED and sliding windows learns English text, byte by byte, on a laptop.

Six layers [base_conv k=3, based f=16, sliding_window w=64] x 2, d 128, SwiGLU, 1.1 million parameters. Without a path it
reads the help topics of Python, which every machine has; with one, your text:

Command:  python -m train --config text/small --workdir runs/text
          python -m train --config text/small --config.data.path=FILE --workdir runs/mine
          python -m train --config text/small:transformer ...      the same steps and parameters, softmax attention
Expected: held-out bits per byte as in docs/results.md, and a sample at the end (WORKDIR/sample.txt)
Time:     about 6 minutes on 2 CPU cores

For subwords: --config.data.tokenizer=bpe --config.model.vocab_size=4096.
"""

from train.config import base_config

HYBRID = (
    {"name": "base_conv", "kernel_size": 3},
    {"name": "based", "feature_dim": 16, "num_heads": 4},
    {"name": "sliding_window", "window": 64, "num_heads": 4, "rotary_fraction": 1.0},
)
TRANSFORMER = ({"name": "attention", "num_heads": 4, "rotary_fraction": 1.0},)
VARIANTS = ("hybrid", "transformer")


def get_config(variant="hybrid"):
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    hybrid = variant == "hybrid"
    config = base_config()
    config.task = "text"
    config.steps = 1000
    config.batch_size = 16
    config.learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.05
    config.optimizer.decay_mask = "matrices"
    config.optimizer.clip_norm = 1.0
    config.optimizer.b2 = 0.98
    config.model.vocab_size = 257
    config.model.d_model = 128
    config.model.num_layers = 6
    config.model.mixers = list(HYBRID if hybrid else TRANSFORMER)
    config.model.channel = "swiglu"
    # hidden widths 341 and 284: the wider MLP gives the hybrid what its smaller mixers leave
    config.model.channel_multiplier = 8 / 3 if hybrid else 2.22
    config.model.norm = "rmsnorm"
    config.model.embed_dropout = 0.0
    config.data.length = 256
    config.data.test_batch_size = 16
    config.log.every_steps = 25
    config.eval.every_steps = 250
    return config
