"""python -m eval perplexity and generate: the numbers of a run again, other text, and what is refused."""

import json

import pytest

from eval.__main__ import main
from tests.train.test_text_task import corpus, small  # noqa: F401 (a fixture)
from train.config import base_config, dumps
from train.loop import run


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("trained")
    config = small(corpus, folder, steps=6)
    return folder / "run", run(config, folder / "run")


def command(capsys, *args):
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_perplexity_gives_the_numbers_of_the_run(trained, capsys, tmp_path):
    workdir, summary = trained
    target = tmp_path / "new" / "p.json"
    code, out, _ = command(capsys, "perplexity", "--checkpoint", workdir, "--json", target)
    assert code == 0
    result = json.loads(target.read_text())
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert result[name] == pytest.approx(summary["metrics"][f"eval/{name}"], rel=1e-6)
    assert f"bits per byte {result['bits_per_byte']:.4f}" in out


def test_perplexity_of_other_text_and_length(trained, capsys, tmp_path):
    workdir, _ = trained
    other = tmp_path / "other.txt"
    other.write_text("the cat ate the bone " * 20)
    target = tmp_path / "p.json"
    options = ("--path", other, "--length", 100, "--batch_size", 2, "--json", target)
    code, _, err = command(capsys, "perplexity", "--checkpoint", workdir, *options)
    assert code == 0, err
    result = json.loads(target.read_text())
    assert result["length"] == 100
    assert result["tokens"] == 420  # every byte is predicted, the first one from the end of nothing


def test_generate_goes_on_with_the_prompt(trained, capsys):
    workdir, _ = trained
    options = ("--prompt", "the cat", "--max_new_tokens", 12, "--num_samples", 2)
    code, out, err = command(capsys, "generate", "--checkpoint", workdir, *options)
    assert code == 0, err
    assert out.count("the cat") >= 2
    assert "tokens in" in err
    again = command(capsys, "generate", "--checkpoint", workdir, *options)[1]
    assert again == out


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("perplexity", ("--length", 1), "--length must be at least 2"),
        ("perplexity", ("--path", "nowhere.txt"), "nowhere.txt"),
        ("perplexity", ("--step", "77"), "no checkpoint of step 77"),
        ("generate", ("--num_samples", 0), "--num_samples must be at least 1"),
        ("generate", ("--top_p", 2), "top_p"),
        ("generate", ("--temperature", -1), "temperature"),
        ("generate", ("--max_new_tokens", 0), "max_new_tokens"),
    ],
)
def test_refused(trained, capsys, task, options, message):
    code, out, err = command(capsys, task, "--checkpoint", trained[0], *options)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in out + err


def test_a_tokenizer_of_another_vocabulary(trained, capsys, tmp_path):
    from train.data.text import train_bpe

    path = tmp_path / "other.json"
    path.write_bytes(train_bpe(["a few words to begin with"] * 3, 260).to_json())
    options = ("--tokenizer", path)
    code, _, err = command(capsys, "perplexity", "--checkpoint", trained[0], *options)
    assert code == 2
    assert "260 tokens and the checkpoint was trained with 257" in err


def test_a_run_of_another_task(capsys, tmp_path):
    config = base_config()
    (tmp_path / "config.json").write_text(dumps(config))
    code, _, err = command(capsys, "generate", "--checkpoint", tmp_path)
    assert code == 2
    assert "was trained on 'mqar', not on text" in err
