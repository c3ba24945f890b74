"""A model trained with one implementation of BASED gives the loss curve of another."""

import json

import numpy as np
import pytest

from train.config import base_config
from train.loop import run

STEPS = 200


def curve(tmp_path, implementation):
    """The training loss of every tenth step; a sequence is two chunks long, so that the forms differ."""
    config = base_config()
    config.steps, config.batch_size, config.steps_per_call = STEPS, 4, 20
    config.learning_rate, config.optimizer.warmup_steps = 1e-2, 10
    config.model.vocab_size, config.model.d_model, config.model.embed_dropout = 258, 32, 0.0
    config.model.mixers = [
        {"name": "base_conv", "kernel_size": 3},
        {"name": "based", "feature_dim": 8, "implementation": implementation},
    ]
    config.data.train = ({"length": 256, "num_kv_pairs": 8, "num_examples": 800},)
    config.data.test = ({"length": 64, "num_kv_pairs": 4, "num_examples": 4},)
    config.log.every_steps, config.eval.every_steps = 10, STEPS
    config.log.tensorboard = config.log.progress = False
    workdir = tmp_path / str(implementation)
    run(config, workdir)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.array([row["train/loss"] for row in rows if "train/loss" in row])


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return curve(tmp_path_factory.mktemp("curves"), "quadratic")


@pytest.mark.parametrize("implementation", ["chunked", None])
def test_loss_curves_agree(tmp_path, expected, implementation):
    """Rounding alone separates them: 1e-7 a step, which 200 steps of AdamW may enlarge a thousandfold."""
    got = curve(tmp_path, implementation)
    assert len(got) == STEPS // 10
    assert got[-1] < 0.9 * got[0]  # it learned something, so a difference would show
    np.testing.assert_allclose(got, expected, rtol=1e-4)
