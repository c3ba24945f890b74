"""The papers' experiments: every setting, the published bytes, and what the windows can reach."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.models.language_model import build_language_model
from jaxmodels.state_size import legacy_state_bytes
from train.check import check
from train.config import expand_runs
from train.config_files import find_config, load_config
from train.optimizer import make_schedule, steps_per_epoch
from train.published import RECALL_MEMORY

PAPER = {  # what both figures share, in the terms of the published configs
    "vocab_size": 8192,
    "d_model": None,
    "num_layers": 2,
    "channel": "identity",
    "channel_multiplier": None,
    "norm": "layernorm",
    "norm_epsilon": 1e-5,
    "tie_embeddings": True,
    "initializer_range": 0.02,
    "embed_dropout": 0.1,
    "resid_dropout": 0.0,
    "dtype": "float32",
}
OPTIMIZER = {  # torch.optim.AdamW with CosineAnnealingLR per epoch, and nothing else
    "name": "adamw",
    "weight_decay": 0.1,
    "decay_mask": "all",
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "clip_norm": 0.0,
    "warmup_steps": 0,
    "final_fraction": 0.0,
    "schedule": "cosine_per_epoch",
}


@pytest.mark.parametrize("name", ["mqar/based_fig2", "mqar/zoology_fig2"])
def test_the_settings_both_papers_share(name):
    config = load_config(name)
    for _, run in expand_runs(config):
        assert {k: run.model[k] for k, v in PAPER.items() if v is not None} == {
            k: v for k, v in PAPER.items() if v is not None
        }
        assert {k: run.optimizer[k] for k in OPTIMIZER} == OPTIMIZER
        assert (run.seed, run.data.seed, run.data.power_a) == (123, 123, 0.01)
        assert (run.eval.stop_metric, run.eval.stop_value) == ("eval/accuracy", 0.99)
        assert run.eval.every_steps == steps_per_epoch(run)  # tested once an epoch, as there
        assert run.data.mode == "device"


def sizes(segments):
    return [(s["length"], s["num_kv_pairs"], s["num_examples"]) for s in segments]


def test_based_figure_2():
    config = load_config("mqar/based_fig2")
    k = 1000
    assert sizes(config.data.train) == [
        (64, 4, 100 * k),
        *((128, 8, 20 * k), (256, 16, 20 * k), (256, 32, 20 * k), (256, 64, 20 * k)),
    ]
    assert sizes(config.data.test) == [
        *((64, 4, k), (64, 8, k), (64, 16, k), (128, 32, k)),
        *((256, 64, k), (512, 128, k), (1024, 256, k)),
    ]
    assert config.data.random_non_queries
    assert (config.batch_size, config.data.test_batch_size) == (256, 32)
    assert steps_per_epoch(config) == 707
    assert config.steps == 32 * 707
    (axes,) = config.sweep
    assert np.allclose(axes["learning_rate"], np.logspace(-3, -1.5, 4), rtol=1e-3)
    assert list(axes["seed"]) == [123]


def test_based_figure_2_has_a_run_for_every_published_point_of_our_mixers():
    runs = dict(expand_runs(load_config("mqar/based_fig2")))
    found = {}
    for run in runs.values():
        model = run.model.to_dict()
        name = model["mixers"][-1]["name"]
        assert run.model.max_positions == 0  # no positions in any of BASED's models
        found.setdefault(name, set()).add(legacy_state_bytes(build_language_model(**model), 1024))
    published = {
        m: {p.state_bytes for p in RECALL_MEMORY if p.mixer == m}
        for m in ("attention", "based", "hyena", "sliding_window")
    }
    for mixer in ("attention", "based", "hyena"):
        assert found[mixer] == published[mixer]
    # the papers' w lets a token see w + 1 keys, and counts w of them: 2 x 128 numbers less
    assert found["sliding_window"] == {b + 4 * 2 * 128 for b in published["sliding_window"]}


def test_dropout_and_initial_weights_of_the_mixers():
    for config in (load_config("mqar/based_fig2"), load_config("mqar/zoology_fig2")):
        for _, run in expand_runs(config):
            for mixer in run.model.mixers:
                assert mixer.get("dropout", 0.0) == (0.1 if mixer["name"] == "attention" else 0.0)
                assert mixer.get("out_range") == (0.02 if mixer["name"] == "based" else None)
                assert mixer.get("num_heads", 1) == 1


def test_zoology_figure_2():
    config = load_config("mqar/zoology_fig2")
    (axes,) = config.sweep
    assert np.allclose(axes["learning_rate"], np.logspace(-4, -2, 4), rtol=1e-3)
    runs = [run for _, run in expand_runs(config)]
    assert len(runs) == 4 * 4 * 4
    pairs = {64: 4, 128: 8, 256: 16, 512: 64}
    batches = {64: 512, 128: 512, 256: 256, 512: 128}
    for run in runs:
        (train,), (test,) = run.data.train, run.data.test
        length = train["length"]
        assert sizes([train, test]) == [
            (length, pairs[length], 100_000),
            (length, pairs[length], 3_000),
        ]
        assert run.batch_size == run.data.test_batch_size == batches[length]
        assert not run.data.random_non_queries
        assert run.steps == 64 * -(-100_000 // batches[length])
        names = [mixer["name"] for mixer in run.model.mixers]
        assert run.model.max_positions == (length if names == ["attention"] else 0)
        kernels = [m.get("kernel_size") for m in run.model.mixers if m["name"] == "base_conv"]
        assert kernels == {"base_conv": [3, -1], "based": [3]}.get(names[-1], [])
        for mixer in run.model.mixers:
            assert mixer.get("max_len", length) == length
            assert mixer.get("feature_dim", 8) == 8


@pytest.mark.parametrize(("name", "epochs"), [("mqar/based_fig2", 32), ("mqar/zoology_fig2", 64)])
def test_the_rate_falls_once_an_epoch(name, epochs):
    run = expand_runs(load_config(name))[0][1]
    run.learning_rate = 1.0
    rate, per_epoch = make_schedule(run), steps_per_epoch(run)
    for epoch in (0, 1, epochs // 2, epochs - 1):
        expected = (1 + np.cos(np.pi * epoch / epochs)) / 2
        for step in (epoch * per_epoch, (epoch + 1) * per_epoch - 1):
            assert float(rate(jnp.int32(step))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["mqar/based_fig2", "mqar/zoology_fig2"])
def test_a_reduced_form_can_be_trained_and_measures_the_same(name):
    full, config = load_config(name), load_config(f"{name}:reduced")
    check(config)
    originals = dict(expand_runs(full))
    tokens = 0
    for run_name, run in expand_runs(config):
        original = originals[run_name]
        assert run.model == original.model
        for key in ("test", "random_non_queries", "power_a", "seed"):
            assert run.data[key] == original.data[key]
        sizes = [s["num_examples"] for s in original.data.train]
        share = run.data.train[0]["num_examples"] / sizes[0]
        expected = [
            {**s, "num_examples": int(s["num_examples"] * share)} for s in original.data.train
        ]
        assert list(run.data.train) == expected  # the same mix, of fewer examples
        rows = sum(s["num_examples"] * s["length"] for s in run.data.train)
        tokens += rows * run.steps / steps_per_epoch(run)
        assert run.steps / steps_per_epoch(run) <= original.steps / steps_per_epoch(original) / 4
    assert tokens < 900e6  # an hour at 250,000 tokens a second
    assert not config.sweep


def test_the_shares_in_the_docstring_are_those_of_the_data():
    """A window of w answers a query that stands at most w after its value; nothing else tells it the value."""
    config = load_config("mqar/based_fig2")
    rng = np.random.default_rng(0)
    distances = []
    for n, space, power in (  # pairs, slots of the query region, its power law
        (s["num_kv_pairs"], s["length"] // 2 - s["num_kv_pairs"], config.data.power_a - 1)
        for s in config.data.test
    ):
        weights = np.arange(1.0, space + 1) ** power
        weights /= weights.sum()
        rows = [rng.choice(space, n, replace=False, p=weights) for _ in range(200)]
        values = 2 * np.arange(n) + 1
        distances.append(2 * n + 2 * np.array(rows) - values)
    shares = [np.mean([(d <= w).mean() for d in distances]) for w in 2 ** np.arange(3, 11)]
    text = find_config("mqar/based_fig2").read_text()
    table = {
        row: np.array(
            [float(x) for x in re.search(rf"^ +{row} +([\d. ]+)$", text, re.M)[1].split()]
        )
        for row in ("share", "published")
    }
    assert np.abs(table["share"] - shares).max() < 0.01
    published = [p.accuracy for p in RECALL_MEMORY if p.mixer == "sliding_window"]
    assert np.array_equal(table["published"], published)
    assert np.abs(table["share"] - published)[1:].max() < 0.005  # all but w = 8, see the docstring
