"""Attention recalls at any width; gated convolutions need a width that grows with the length (Zoology, figure 2).

MQAR at four lengths, 64 tokens with 4 pairs to 512 with 64, one run for each length, width and mixer (arXiv 2312.04927).
All settings are those of the published config (vocabulary 8,192, 64 epochs over 100,000 examples, batch 512, 512, 256 and
128, the rate constant within an epoch, the best of four) for the mixers that exist here: two layers of attention with
learned positions, of Hyena, BaseConv with a filter of 3 and one as long as the row, and a short convolution with BASED (f = 8).

Command:  python -m train --config mqar/zoology_fig2 --workdir runs/zoology_fig2
Expected: plots/zoology_fig2.png: our lines on the dashed ones of the paper (train/published.py). At 64, 128, 256 and 512
          wide: attention 1.0 everywhere; BaseConv .70, .94, .96, 1.0 at length 64, but .01, .01, .05, .71 at length 512;
          Hyena .52, .75, .84, .86 at length 64, but .01, .03, .09, .18 at length 512. BASED is not in the published table
Time:     4 mixers x 4 widths x 4 lengths x 4 rates = 256 runs; the paper made 448, with three mixers more, on 8 A100

The reduced form fits 2 CPU cores:

Command:  python -m train --config mqar/zoology_fig2:reduced --workdir runs/zoology_fig2_reduced
Expected: at length 64 and 64 and 128 wide: attention and BASED at least .99 at both; BaseConv and Hyena below them, higher
          at 128 than at 64, and below the paper's .70 and .94, .52 and .75
Time:     about an hour on 2 CPU cores (at most 102 M tokens a model, 8 models; a run ends at .99)

Only length 64 is left of four, two widths of four, 16 epochs (of batches of 256) of 64, one learning rate of four with a
short warm-up, one seed. That keeps the claim on this length: width is what the convolutions lack and attention does not
need. It says nothing about the growth with the length, for which the full form is there.
"""

from train.config import base_config
from train.data.mqar_mixes import ZOOLOGY_FIG2

VARIANTS = ("full", "reduced")
EPOCHS = 64


def get_config(variant="full"):
    config = base_config()
    config.seed = 123
    config.model.vocab_size = 8192
    config.model.num_layers = 2
    config.model.channel = "identity"
    config.model.embed_dropout = 0.1
    config.data.power_a = 0.01
    config.data.seed = 123
    config.data.random_non_queries = False
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay_mask = "all"
    config.optimizer.schedule = "cosine_per_epoch"
    config.eval.stop_metric = "eval/accuracy"
    config.eval.stop_value = 0.99
    config.plot = "zoology_fig2"
    if variant == "reduced":
        return reduced(config)
    config.sweep = ({"learning_rate": [1e-4, 4.642e-4, 2.154e-3, 1e-2], "seed": [123]},)
    config.runs = tuple(
        run(mixer, length, d)
        for length in ZOOLOGY_FIG2
        for mixer in ("attention", "hyena", "base_conv", "based")
        for d in (64, 128, 256, 512)
    )
    return config


def reduced(config):
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    rates = {"attention": 1e-3, "hyena": 3e-3, "base_conv": 3e-3, "based": 1e-2}
    epochs = schedule(length=64, batch_size=256, epochs=16)
    config.runs = tuple(
        {**run(mixer, 64, d), **epochs, "learning_rate": rate}
        for mixer, rate in rates.items()
        for d in (64, 128)
    )
    return config


def run(mixer, length, d):
    """A run of one mixer: its layers, the data of that length, and steps for EPOCHS passes over them."""
    layers = {
        "attention": [{"name": "attention", "num_heads": 1, "dropout": 0.1}],
        "hyena": [{"name": "hyena", "max_len": length}],
        "base_conv": [
            {"name": "base_conv", "kernel_size": 3},
            {"name": "base_conv", "kernel_size": -1, "max_len": length},
        ],
        # the original's initial weights: .02 in the output projection, too
        "based": [
            {"name": "base_conv", "kernel_size": 3},
            {"name": "based", "feature_dim": 8, "out_range": 0.02},
        ],
    }
    data = ZOOLOGY_FIG2[length]
    return {
        "name": f"{mixer}-L{length}-d{d}",
        "model.d_model": d,
        "model.mixers": layers[mixer],
        "model.max_positions": length if mixer == "attention" else 0,
        "data.train": data["train"],
        "data.test": data["test"],
        "data.test_batch_size": data["batch_size"],
        **schedule(length, data["batch_size"], EPOCHS),
    }


def schedule(length, batch_size, epochs):
    """Steps for so many passes over the training data, evaluated after each."""
    examples = sum(segment["num_examples"] for segment in ZOOLOGY_FIG2[length]["train"])
    steps_per_epoch = -(-examples // batch_size)
    return {
        "batch_size": batch_size,
        "steps": epochs * steps_per_epoch,
        "eval.every_steps": steps_per_epoch,
    }
