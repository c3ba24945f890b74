"""The text task: what a row's labels are, where documents end, and what the held-out numbers mean."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from train.check import check
from train.config import base_config
from train.config_files import load_config
from train.config_paths import set_key
from train.errors import UserError
from train.loop import build_model, run
from train.suite import run_suite
from train.tasks import build_task, text
from train.tasks.text_evaluation import make_evaluate, segment_ids_of

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "and",
    "the",
    "dog",
    "ate",
    "the",
    "bone",
    "while",
    "it",
    "rained",
    "all",
    "day",
    "long",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Thirty documents of words, told apart by the separator."""
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, rng.integers(5, 40))) for _ in range(30)]
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


def small(corpus, tmp_path, **changes):
    config = base_config()
    keys = {
        "task": "text",
        "steps": 4,
        "batch_size": 4,
        "model.vocab_size": 257,
        "model.d_model": 8,
        "model.num_layers": 1,
        "model.mixers": [{"name": "base_conv"}],
        "model.embed_dropout": 0.0,
        "data.path": str(corpus),
        "data.length": 32,
        "data.held_out": 0.2,
        "data.test_batch_size": 3,
        "data.cache_dir": str(tmp_path / "tokens"),
        "log.tensorboard": False,
        "log.progress": False,
    }
    for key, value in (keys | changes).items():
        set_key(config, key.replace("__", "."), value)
    return config


def batch_of(task, step=0):
    inputs = task.inputs(step, 1)
    program, _ = task.program_at(step)
    return jax.tree.map(np.asarray, task.batch(program, inputs, jnp.int32(step), jnp.int32(0)))


def test_labels_are_the_next_tokens_and_segments_the_documents(corpus, tmp_path):
    task = build_task(small(corpus, tmp_path))
    text_of_corpus = corpus.read_text().split("<|endoftext|>\n")
    batch = batch_of(task)
    assert batch["tokens"].shape == batch["labels"].shape == (4, 32)
    np.testing.assert_array_equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    for tokens, ids in zip(batch["tokens"], batch["segment_ids"]):
        pieces = [tokens[ids == i] for i in np.unique(ids)]
        for i, piece in enumerate(pieces):
            if piece[0] == 256:  # the piece begins a document, after its `end`
                assert i or len(pieces) == 1 or tokens[0] == 256
                piece = piece[1:]
            assert 256 not in piece
            written = bytes(piece.astype(np.uint8)).decode()
            assert any(written in document for document in text_of_corpus), written


def test_segment_ids_grow_at_ends():
    tokens = jnp.array([[5, 9, 0, 0, 9, 1], [9, 2, 2, 2, 2, 2]])
    expected = [[1, 2, 2, 2, 3, 3], [2, 2, 2, 2, 2, 2]]
    np.testing.assert_array_equal(segment_ids_of(tokens, 9), expected)


def test_loss_is_the_mean_over_every_position(corpus, tmp_path):
    """Against logits of the whole vocabulary, document by document, without packing."""
    config = small(corpus, tmp_path)
    task, model = build_task(config), build_model(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    batch = batch_of(task)
    found, metrics = task.loss(model, params, jax.tree.map(jnp.asarray, batch), None)
    total = 0.0
    for tokens, labels, ids in zip(batch["tokens"], batch["labels"], batch["segment_ids"]):
        for i in np.unique(ids):
            here = ids == i
            logits, _ = model.apply({"params": params}, jnp.asarray(tokens[here][None]))
            log_p = jax.nn.log_softmax(logits[0])
            total -= float(np.take_along_axis(np.asarray(log_p), labels[here][:, None], 1).sum())
    assert float(found) == pytest.approx(total / batch["labels"].size, rel=1e-5)
    assert float(metrics["loss"][1]) == batch["labels"].size


class Uniform(nn.Module):
    """A model that gives every token the same probability."""

    def hidden(self, tokens, state=None, segment_ids=None):
        return jnp.zeros((*tokens.shape, 1)), None

    def head(self, hidden):
        return jnp.zeros((*hidden.shape[:-1], 257))


def test_bits_per_byte_of_a_model_that_knows_nothing(corpus, tmp_path):
    """Every token costs log2(257) bits, and all but the ends of documents are bytes."""
    from train.data.text import held_out_rows

    config = small(corpus, tmp_path)
    data = text.load_data(config)
    for length, batch_size in ((32, 3), (50, 7), (4000, 1)):
        rows, _ = held_out_rows(data.held_out, length)
        evaluate = make_evaluate(rows, batch_size, end=data.end, token_bytes=data.token_bytes)
        metrics = evaluate(Uniform(), {})
        tokens = np.asarray(data.held_out.tokens)[1:]
        letters = (tokens != 256).sum()
        assert metrics["eval/loss"] == pytest.approx(math.log(257), rel=1e-6)
        assert metrics["eval/perplexity"] == pytest.approx(257, rel=1e-5)
        expected = math.log2(257) * len(tokens) / letters
        assert metrics["eval/bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_a_run_reports_and_samples(corpus, tmp_path):
    config = small(corpus, tmp_path, data__sample_prompt="the ")
    summary = run(config, tmp_path / "run")
    assert set(summary["metrics"]) >= {"eval/loss", "eval/perplexity", "eval/bits_per_byte"}
    assert summary["metrics"]["eval/perplexity"] == pytest.approx(
        math.exp(summary["metrics"]["eval/loss"])
    )
    assert summary["input_wait_seconds"] >= 0
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("the ")
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text())


def test_a_model_learns_the_words(corpus, tmp_path):
    """Sixty steps on thirty short documents of 16 words: far below the 8 bits a byte of knowing nothing."""
    config = small(corpus, tmp_path, steps=60, learning_rate=3e-2, model__d_model=32)
    summary = run(config, tmp_path / "run")
    assert summary["metrics"]["eval/bits_per_byte"] < 2.5


def test_a_trained_bpe_serves_the_run(corpus, tmp_path):
    config = small(corpus, tmp_path, data__tokenizer="bpe", model__vocab_size=300)
    summary = run(config, tmp_path / "run")
    by_bytes = math.log2(257) * 1.05
    assert 0 < summary["metrics"]["eval/bits_per_byte"] < by_bytes
    assert text.read_tokenizer(tmp_path / "run").vocab_size == 300


def test_the_directory_of_another_tokenizer_is_refused(corpus, tmp_path):
    config = small(corpus, tmp_path)
    run(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is not what this config makes"):
        run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.path": "no/such/file.txt"}, "no/such/file.txt"),
        ({"data.length": 1}, "config.data.length must be at least 2, got 1"),
        ({"data.held_out": 1.5}, "config.data.held_out must be between 0 and 1"),
        ({"data.errors": "ignore"}, "config.data.errors must be strict or replace"),
        ({"model.vocab_size": 256}, "257 tokens and the model config.model.vocab_size=256"),
        ({"data.tokenizer": "bpe", "model.vocab_size": 100}, "at least 257 to train"),
        ({"data.tokenizer": "no/such"}, "no/such"),
    ],
)
def test_bad_configs(corpus, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as refused:
        check(small(corpus, tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_text_shorter_than_a_row(corpus, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    config = small(tmp_path / "short.txt", tmp_path, data__length=64)
    check(config)
    with pytest.raises(UserError, match="64"):
        build_task(config)


def test_both_variants_of_the_config_have_one_size():
    from train.state import count_parameters

    sizes = []
    for variant in ("hybrid", "transformer"):
        config = load_config(f"text/small:{variant}")
        check(config)
        params = jax.eval_shape(
            build_model(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
        )
        sizes.append(count_parameters(params))
    assert abs(sizes[0] - sizes[1]) < 1e-3 * sizes[0]


def test_the_points_of_a_grid_share_the_batches_of_single_runs(corpus, tmp_path):
    """A grid reads its iterator once for all points; each point ends where a run of its own config ends."""
    changes = {"steps": 12, "log.every_steps": 4, "eval.every_steps": 6, "steps_per_call": 3}
    config = small(corpus, tmp_path, **changes)
    config.sweep = ({"learning_rate": [1e-3, 1e-2]},)
    assert run_suite(config, tmp_path / "grid") == 0
    for rate in (1e-3, 1e-2):
        single = small(corpus, tmp_path, **changes, learning_rate=rate)
        alone = run(single, tmp_path / f"alone-{rate}")
        point = json.loads((tmp_path / "grid" / f"lr={rate:g}" / "summary.json").read_text())
        assert point["steps"] == 12
        for name, value in alone["metrics"].items():
            assert point["metrics"][name] == pytest.approx(value, rel=1e-5), name
