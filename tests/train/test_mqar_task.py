"""The MQAR task: the order of examples, the loss on labels only, evaluation, bad configs. The model is a stand-in."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from train.config import base_config
from train.data import mqar, mqar_zoology
from train.data.mqar import Segment
from train.errors import UserError
from train.tasks import TASKS, build_task
from train.tasks.mqar import FOREVER, Order, loss
from train.tasks.mqar_evaluation import make_evaluate

VOCAB = 18
generate = jax.jit(mqar.examples, static_argnums=0)
fill = jax.jit(mqar.fill, static_argnums=0)
TRACES = []


class Tiny(nn.Module):
    """Embedding, running mean, dense, tied head: enough of a language model to have a loss."""

    auxiliary: float = 0.0
    dropout: float = 0.0

    def setup(self):
        self.embed = nn.Embed(VOCAB, 8, param_dtype=jnp.float32)
        self.dense = nn.Dense(8)
        self.drop = nn.Dropout(self.dropout)

    def hidden(self, tokens, state=None):
        TRACES.append(tokens.shape)
        x = self.embed(tokens)
        x = self.drop(x, deterministic=not self.has_rng("dropout"))
        mean = jnp.cumsum(x, 1) / jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        if self.auxiliary:
            self.sow("losses", "balance", jnp.asarray(self.auxiliary, x.dtype))
        return mean + 0.1 * nn.gelu(self.dense(x)), state

    def head(self, rows):
        return self.embed.attend(rows)

    def __call__(self, tokens):
        return self.head(self.hidden(tokens)[0])


MODEL = Tiny()
PARAMS = MODEL.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def small_config(**changes):
    config = base_config()
    config.batch_size, config.steps_per_call, config.model.vocab_size = 8, 4, VOCAB
    with config.unlocked():
        config.data.train = ({"length": 16, "num_kv_pairs": 3, "num_examples": 20},)
        config.data.test = ({"length": 16, "num_kv_pairs": 3, "num_examples": 20},)
        config.data.test_batch_size = 8
        for path, value in changes.items():
            node, key = config, path.split("__")
            for part in key[:-1]:
                node = node[part]
            node[key[-1]] = value
    return config


# --- the order of examples

MIX = Order(
    tuple(Segment(16, 3, n, vocab_size=VOCAB, seed=n) for n in (20, 8, 3, 33)), batch_size=8
)


def test_segments_are_visited_in_order_and_wrap_round():
    """Against a walk through three epochs, one batch after the other."""
    taken = [0] * 4
    step = 0
    indices = jax.jit(lambda step: [MIX.indices(i, step) for i in range(4)])
    for _epoch in range(3):
        for index, segment in enumerate(MIX.segments):
            steps = math.ceil((segment.num_examples or 0) / 8)
            for left in range(steps, 0, -1):
                assert MIX.program_at(step) == (index, left)
                want = (taken[index] * 8 + np.arange(8)) % segment.num_examples
                np.testing.assert_array_equal(indices(jnp.int32(step))[index], want)
                np.testing.assert_array_equal(MIX.host_indices(index, step, left)[0], want)
                taken[index] += 1
                step += 1
    assert step == 3 * sum(MIX.steps) == 3 * (3 + 1 + 1 + 5)


def test_one_segment_is_walked_through_for_ever():
    order = Order((Segment(16, 3, 20, vocab_size=VOCAB),), batch_size=8)
    for step in (0, 1, 2, 3, 2_000_000_000):
        assert order.program_at(step) == (0, FOREVER)
        want = (step * 8 + np.arange(8)) % 20
        np.testing.assert_array_equal(order.indices(0, jnp.int32(step)), want)
        np.testing.assert_array_equal(order.host_indices(0, step, 1)[0], want)


def test_an_endless_segment_never_repeats():
    order = Order((Segment(16, 3, None, vocab_size=VOCAB),), batch_size=8)
    assert order.program_at(10**6) == (0, FOREVER)
    for step in (0, 7, 500_000_000):
        np.testing.assert_array_equal(
            order.indices(0, jnp.int32(step)), step * 8 + np.arange(8, dtype=np.int64)
        )


def test_batches_are_the_examples_of_their_indices():
    task = build_task(small_config())
    (segment, *_), _ = segments(small_config())
    batch = jax.jit(task.batch, static_argnums=0)(0, task.inputs(3, 1), 3, 0)
    want = generate(segment, jnp.asarray([4, 5, 6, 7, 8, 9, 10, 11], jnp.uint32))
    for name in want:
        np.testing.assert_array_equal(batch[name], want[name])
    assert task.tokens_per_step(0) == 8 * 16
    assert task.sample_tokens == (1, 16)


def segments(config):
    from train.tasks.mqar import segments_of

    return segments_of(config)


def test_zoology_batches_are_the_drawn_examples(tmp_path):
    config = small_config(data__mode="zoology", data__cache_dir=str(tmp_path))
    task = build_task(config)
    (segment,), _ = segments(config)
    draws = mqar_zoology.generate(segment)
    shapes = dict.fromkeys(draws, (4, 8, 3))
    for count in (1, 4):  # one shape, whatever the number of steps
        assert {k: v.shape for k, v in task.inputs(2, count).items()} == shapes
    batch = jax.jit(task.batch, static_argnums=0)
    for offset in range(4):
        got = batch(0, task.inputs(2, 4), jnp.int32(2 + offset), jnp.int32(offset))
        want = ((2 + offset) * 8 + np.arange(8)) % 20
        np.testing.assert_array_equal(got["labels"], draws["values"][want])
        np.testing.assert_array_equal(got["positions"], 6 + 2 * draws["slots"][want])
        np.testing.assert_array_equal(got["tokens"][:, 0:6:2], draws["keys"][want])
        filler = np.array(fill(segment, jnp.asarray(want, jnp.uint32)))
        np.put_along_axis(filler, 2 * draws["slots"][want], draws["keys"][want], 1)
        np.testing.assert_array_equal(got["tokens"][:, 6:], filler)
    # the original's seeds, unless told otherwise
    assert segment.seed == mqar_zoology.segment_seeds(123, 1, 1)[0][0]
    other = small_config(data__mode="zoology", data__seed=5)
    assert segments(other)[0][0].seed == mqar_zoology.segment_seeds(5, 1, 1)[0][0]


def test_training_and_test_segments_have_seeds_of_their_own():
    same = small_config(data__train=({"length": 16, "num_kv_pairs": 3, "num_examples": 20},) * 3)
    train, test = segments(same)
    assert len({s.seed for s in (*train, *test)}) == 4
    assert segments(small_config(seed=1))[0][0].seed != train[0].seed


def test_a_segment_may_override_what_all_share():
    listed = ({"length": 16, "num_kv_pairs": 2, "num_passes": 2, "power_a": 1, "num_examples": 5},)
    config = small_config(data__train=listed, data__random_non_queries=False)
    (segment,), (test,) = segments(config)
    assert (segment.num_passes, segment.power_a, segment.random_non_queries) == (2, 1, False)
    assert (test.num_passes, test.power_a, test.vocab_size) == (1, 0.01, VOCAB)


# --- the loss

SEGMENT = Segment(16, 3, 20, vocab_size=VOCAB, seed=3)
BATCH = generate(SEGMENT, jnp.arange(8, dtype=jnp.uint32))


def full_head_loss(params, batch):
    """The original's way: logits everywhere, labels of -100 where nothing is asked, mean over the others."""
    labels = np.full(batch["tokens"].shape, -100)
    np.put_along_axis(labels, np.asarray(batch["positions"]), np.asarray(batch["labels"]), 1)
    logp = jax.nn.log_softmax(MODEL.apply({"params": params}, batch["tokens"]))
    own = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(labels >= 0, own, 0)) / (labels >= 0).sum()


def test_the_head_on_labels_gives_the_loss_of_the_whole_head():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), PARAMS)
        mine = jax.jit(jax.value_and_grad(lambda p: loss(MODEL, p, BATCH, None)[0]))(params)
        want = jax.jit(jax.value_and_grad(lambda p: full_head_loss(p, BATCH)))(params)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)  # float64, values of order 1


def test_metrics_are_sums_and_counts():
    total, metrics = jax.jit(lambda p: loss(MODEL, p, BATCH, None))(PARAMS)
    assert set(metrics) == {"loss", "accuracy"}
    assert float(metrics["loss"][1]) == 8 * 3
    assert float(metrics["accuracy"][1]) == 8
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], total, rtol=1e-6)
    right, _ = brute_force(BATCH)
    np.testing.assert_allclose(metrics["accuracy"][0], right.sum(), rtol=1e-6)


def test_sown_losses_are_added():
    compute = jax.jit(loss, static_argnums=0)
    plain, _ = compute(MODEL, PARAMS, BATCH, None)
    total, metrics = compute(Tiny(auxiliary=0.25), PARAMS, BATCH, None)
    np.testing.assert_allclose(total, plain + 0.25, rtol=1e-6)
    np.testing.assert_allclose(metrics["aux_loss"][0] / metrics["aux_loss"][1], 0.25, rtol=1e-6)


def test_the_key_switches_dropout_on():
    compute = jax.jit(loss, static_argnums=0)
    keys = (None, None, *jax.random.split(jax.random.key(1)))
    values = [float(compute(Tiny(dropout=0.5), PARAMS, BATCH, key)[0]) for key in keys]
    assert values[0] == values[1]
    assert len(set(values)) == 3


# --- evaluation


def brute_force(batch):
    """Per example: the share of right labels and the mean cross-entropy, in numpy from the whole logits."""
    logits = np.asarray(MODEL.apply({"params": PARAMS}, batch["tokens"]), np.float64)
    at = np.take_along_axis(logits, np.asarray(batch["positions"])[..., None], 1)
    labels = np.asarray(batch["labels"])
    own = np.take_along_axis(at, labels[..., None], -1)[..., 0]
    loss = np.log(np.exp(at).sum(-1)) - own
    return (at.argmax(-1) == labels).mean(-1), loss.mean(-1)


TEST = (
    Segment(16, 3, 21, vocab_size=VOCAB, seed=2**31),
    Segment(16, 4, 8, vocab_size=VOCAB, seed=2**31 + 1),
)


@pytest.mark.parametrize("zoology", [False, True])
def test_evaluation_is_the_brute_force_mean(zoology, tmp_path):
    tested = TEST[:1] if zoology else TEST
    got = make_evaluate(tested, 8, zoology=zoology, cache_dir=tmp_path)(MODEL, PARAMS)
    right, losses, want = [], [], {}
    for segment in tested:
        indices = jnp.arange(segment.num_examples, dtype=jnp.uint32)
        batch = generate(segment, indices)
        if zoology:
            draws = {k: jnp.asarray(v) for k, v in mqar_zoology.generate(segment).items()}
            batch = mqar.assemble(segment, **draws, filler=fill(segment, indices))
        accuracy, loss = brute_force(batch)
        right.append(accuracy)
        losses.append(loss)
        name = f"L16-kv{segment.num_kv_pairs}"
        want |= {f"eval/accuracy/{name}": accuracy.mean(), f"eval/loss/{name}": loss.mean()}
    want["eval/accuracy"] = np.concatenate(right).mean()
    want["eval/loss"] = np.concatenate(losses).mean()
    assert got.keys() == want.keys()
    for name, value in want.items():
        # accuracies are counted in integers; losses are float32 sums
        rtol = 1e-12 if "accuracy" in name else 1e-6
        np.testing.assert_allclose(got[name], value, rtol=rtol, err_msg=name)
    assert 0 < got["eval/accuracy"] < 1  # so that the comparison means something


def test_evaluation_compiles_once_and_repeats_itself():
    evaluate = make_evaluate(TEST[:1], 8, include_slices=False)
    first = evaluate(MODEL, PARAMS)
    traces = len(TRACES)
    assert evaluate(MODEL, PARAMS) == first
    assert len(TRACES) == traces
    assert set(first) == {"eval/accuracy", "eval/loss"}
    # the batch size cuts the same examples differently
    again = make_evaluate(TEST[:1], 7, include_slices=False)(MODEL, PARAMS)
    assert again["eval/accuracy"] == first["eval/accuracy"]
    np.testing.assert_allclose(again["eval/loss"], first["eval/loss"], rtol=1e-6)
    # another model, the same function
    assert evaluate(Tiny(auxiliary=1.0), PARAMS) == first


def test_a_perfect_model_is_perfect():
    """The label of a query is the token behind the key's last appearance, which an oracle can read off."""

    class Oracle(nn.Module):
        def hidden(self, tokens, state=None):
            t = jnp.arange(tokens.shape[1])
            seen = (tokens[:, :, None] == tokens[:, None, :]) & (t[:, None] > t) & (t < 6)
            at = jnp.argmax(seen, -1)
            answer = jnp.take_along_axis(tokens, jnp.minimum(at + 1, tokens.shape[1] - 1), 1)
            return 50.0 * jax.nn.one_hot(answer, VOCAB), state

        def head(self, rows):
            return rows

    got = make_evaluate(TEST[:1], 8)(Oracle(), PARAMS)
    assert got["eval/accuracy"] == 1.0
    assert got["eval/loss"] < 1e-6


# --- bad configs

ROW = {"length": 16, "num_kv_pairs": 3, "num_examples": 20}
ENDLESS = {**ROW, "num_examples": None}
BAD = {
    "odd length": (dict(data__train=({**ROW, "length": 17},)), r"config.data.train\[0\]: length 17 is odd"),
    "too many pairs": (
        dict(data__test=(ROW, {**ROW, "num_kv_pairs": 5})),
        r"config.data.test\[1\]: 4\*kv > length",
    ),
    "small vocabulary": (dict(model__vocab_size=16), "vocab_size 16 must be larger than length 16"),
    "mistyped key": (
        dict(data__train=({**ROW, "num_kv_pair": 3},)),
        r"config.data.train\[0\] has no key 'num_kv_pair'; did you mean num_kv_pairs\?",
    ),
    "unknown key": (dict(data__train=({**ROW, "zebra": 3},)), "has no key 'zebra'; it has length, "),
    "no length": (dict(data__train=({"num_kv_pairs": 3},)), r"config.data.train\[0\] needs length"),
    "not a dict": (dict(data__train=(64,)), r"config.data.train\[0\] must be {'length'"),
    "fraction": (dict(data__train=({**ROW, "length": 16.0},)), r"\[0\].length must be int, got 16.0"),
    "flag as number": (
        dict(data__train=({**ROW, "num_examples": True},)),
        r"\[0\].num_examples must be int or None, got True",
    ),
    "endless among others": (
        dict(data__train=(ROW, ENDLESS)),
        r"config.data.train\[1\] is endless .* has others beside it; give it a number",
    ),
    "endless zoology": (
        dict(data__train=(ENDLESS,), data__mode="zoology"),
        r"config.data.train\[0\] is endless .* is drawn ahead of time",
    ),
    "endless test": (dict(data__test=(ENDLESS,)), r"config.data.test\[0\] is endless"),
    "nothing to train on": (dict(data__train=()), "config.data.train is empty"),
    "nothing to test on": (dict(data__test=()), "config.data.test is empty"),
    "never repeats": (
        dict(data__train=({**ROW, "num_examples": 2**31 - 1},)),
        r"repeat only after more than 2\^32 examples; use a multiple of the batch size",
    ),
    "unknown task": (dict(task="mqr"), "config.task must be one of mqar, text, got 'mqr'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_configs_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        build_task(small_config(**changes))
    assert "\n" not in str(caught.value)


def test_an_endless_segment_alone_is_fine():
    task = build_task(small_config(data__train=(ENDLESS,)))
    assert task.program_at(12) == (0, FOREVER)
    assert task.best == ("eval/accuracy", "max")


def test_segments_may_be_config_dicts():
    listed = (ConfigDict(ROW),)
    assert segments(small_config(data__train=listed))[0][0].length == 16


def test_the_registry_builds_what_it_names():
    for name, build in TASKS.items():
        config = small_config(task=name)
        config.model.vocab_size = 512  # room for every byte
        assert dataclasses.is_dataclass(task := build(config))
        assert task.name == name
