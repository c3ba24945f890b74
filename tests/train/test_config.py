"""Run configs: every key documented, paths, types, suggestions, JSON and back, suites, named files."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.cli import help_text
from train.config import KEYS, base_config, differences, dumps, expand_runs, from_plain
from train.config_files import available, find_config, load_config, split_variant, variants
from train.config_paths import get_key, nearest, parse_path, set_key, to_plain
from train.errors import UserError

# --- keys ---------------------------------------------------------------------------------------------------------


def test_every_key_has_a_default_and_a_meaning():
    config = base_config()
    assert len({path for path, _, _ in KEYS}) == len(KEYS)
    for path, default, meaning in KEYS:
        assert to_plain(get_key(config, path)) == to_plain(default)
        assert meaning
        assert not meaning.endswith(".")


def test_the_names_that_stay():
    config = base_config()
    for key in ("steps", "seed", "batch_size", "learning_rate", "steps_per_call"):
        assert key in config
    for group in ("model", "data", "mesh", "checkpoint"):
        assert len(config[group]) > 1
    assert config.checkpoint.every_seconds < 10  # a killed run loses less than ten seconds


def test_configs_share_nothing():
    first, second = base_config(), base_config()
    first.model.mixers[0]["name"] = "hyena"
    first.data.train[0]["length"] = 8
    assert second.model.mixers[0]["name"] == base_config().model.mixers[0]["name"] == "attention"
    assert base_config().data.train[0]["length"] == 64


def test_a_typo_in_a_config_file_cannot_pass_silently():
    with pytest.raises(AttributeError):
        base_config().model.d_modle = 64


# --- paths and types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("steps", "10", 10),
        ("steps", "1e4", 10_000),
        ("steps", "10_000", 10_000),
        ("mesh.data", "-1", -1),
        ("learning_rate", "1", 1.0),
        ("learning_rate", "3e-3", 3e-3),
        ("task", "mqar", "mqar"),
        ("task", "7", "7"),
        ("log.wandb", "true", True),
        ("log.wandb", "1", True),
        ("log.progress", "False", False),
        ("model.mixers[0].name", "based", "based"),
        ("model.mixers[0].feature_dim", "24", 24),
        ("model.mixers[-1].implementation", "chunked", "chunked"),
        ("model.mixers[0].head_dim", "none", None),
        (
            "model.mixers",
            "[{'name': 'based'}, {'name': 'hyena'}]",
            [{"name": "based"}, {"name": "hyena"}],
        ),
        ("model.mixers[0]", "{'name': 'based'}", {"name": "based"}),
        ("data.train[0].num_examples", "none", None),
        ("data.train[0]", "{'length': 128}", {"length": 128}),
        ("data.test", "[{'length': 128}]", ({"length": 128},)),
    ],
)
def test_text_is_read_as_the_type_of_the_key(path, text, value):
    config = base_config()
    set_key(config, path, text)
    got = get_key(config, path)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("steps", "many", "config.steps must be an integer, got 'many'"),
        ("steps", "1.5", "config.steps must be an integer"),
        ("steps", True, "config.steps must be an integer"),
        ("steps", "", "config.steps must be an integer"),
        ("learning_rate", "nan", "config.learning_rate must be a number"),
        ("learning_rate", math.inf, "config.learning_rate must be a number"),
        ("learning_rate", "fast", "config.learning_rate must be a number"),
        ("log.wandb", "maybe", "config.log.wandb must be true or false"),
        ("task", 3, "config.task must be a string"),
        ("model.mixers", "based", "config.model.mixers must be a list like"),
        ("model.mixers[0]", "based", "must be a dict like"),
        ("data.train", "64", "config.data.train must be a list like"),
        ("model", "{}", "config.model is a group; set one of its keys: config.model."),
        ("model.mixers[1].name", "based", "index 1 is past the end, the list has 1 items"),
        ("steps[0]", "1", "needs a list"),
        ("model..d_model", "1", "write it like config.model.mixers[0].name"),
        ("[0]", "1", "write it like"),
        ("model.mixers[x]", "1", "write it like"),
        ("", "1", "a config key is missing"),
    ],
)
def test_impossible_values_are_one_clear_line(path, value, message):
    with pytest.raises(UserError) as error:
        set_key(base_config(), path, value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("model.d_modle", "model.d_model"),
        ("d_model", "model.d_model"),
        ("learning_rat", "learning_rate"),
        ("optimiser.weight_decay", "optimizer.weight_decay"),
        ("checkpoint.keep_lastest", "checkpoint.keep_latest"),
        ("modle.mixers[0].name", "model.mixers[0].name"),
        ("model.mixers[0].name.x", "model.mixers[0].name"),
    ],
)
def test_an_unknown_key_names_the_nearest(typo, meant):
    with pytest.raises(UserError, match=r"no config key config\.") as error:
        set_key(base_config(), typo, "1")
    assert f"did you mean config.{meant}?" in str(error.value)


def test_an_unknown_key_like_no_other_points_to_the_help():
    with pytest.raises(UserError, match="--help lists the keys"):
        set_key(base_config(), "zzz", "1")


def test_nearest_of_nothing():
    assert nearest("x", []) is None
    assert nearest("based", ["mqar/based", "mqar/base_conv"]) == "mqar/based"


names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
indices = st.integers(-99, 99)


@given(st.tuples(names, st.lists(st.one_of(names, indices), max_size=5)))
@settings(max_examples=50, deadline=None)
def test_paths_read_back(parts):
    first, rest = parts
    text = first + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in rest)
    assert parse_path(text) == [first, *rest]


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_a_config_survives_json():
    for name in available():
        config = load_config(name)
        text = dumps(config)
        again = from_plain(json.loads(text))
        assert dumps(again) == text
        assert differences(json.loads(text), config) == []


def test_an_older_directory_lacks_newer_keys():
    plain = to_plain(base_config())
    del plain["optimizer"]["clip_norm"]
    assert from_plain(plain).optimizer.clip_norm == 0
    assert differences(plain, base_config()) == []


def test_a_newer_directory_has_a_key_we_do_not_know():
    plain = to_plain(base_config())
    plain["model"]["d_modle"] = 1
    with pytest.raises(UserError, match=r"did you mean config\.model\.d_model"):
        from_plain(plain)


def test_differences_name_what_must_not_change():
    saved = to_plain(base_config())
    config = base_config()
    config.model.mixers = [{"name": "based"}]
    config.seed = 3
    assert sorted(differences(saved, config)) == [
        "config.model.mixers: [{'name': 'attention'}] -> [{'name': 'based'}]",
        "config.seed: 0 -> 3",
    ]


def test_where_and_how_a_run_happens_may_change():
    config = base_config()
    config.mesh.fsdp = 4
    config.log.every_steps = 1
    config.checkpoint.keep_latest = 9
    config.steps_per_call = 1
    config.data.cache_dir = "elsewhere"
    assert differences(to_plain(base_config()), config) == []


# --- suites -------------------------------------------------------------------------------------------------------


def test_runs_of_a_suite_are_whole_configs():
    config = base_config()
    config.steps = 7
    config.plot = "recall_memory"
    config.runs = (
        {"name": "a", "model.d_model": 32, "model.mixers": [{"name": "based"}]},
        {"name": "b_2", "model.mixers[0].dropout": 0.1},
    )
    (a, first), (b, second) = expand_runs(config)
    assert (a, b) == ("a", "b_2")
    assert first.model.d_model == 32
    assert first.model.mixers == [{"name": "based"}]
    assert second.model.mixers == [{"name": "attention", "dropout": 0.1}]
    assert second.steps == 7
    assert len(first.runs) == len(second.runs) == 0
    assert config.model.mixers == [{"name": "attention"}]  # the suite itself is untouched


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (({"model.d_model": 32},), "needs a 'name'"),
        (({"name": "../up"},), "needs a 'name'"),
        (({"name": ".."},), "needs a 'name'"),
        (("a",), "needs a 'name'"),
        (({"name": "a"}, {"name": "a"}), "two runs named 'a'"),
        (
            ({"name": "a", "model.d_modle": 3},),
            "run 'a': no config key config.model.d_modle; did you mean",
        ),
        (({"name": "a", "steps": "x"},), "run 'a': config.steps must be an integer"),
    ],
)
def test_impossible_suites(runs, message):
    config = base_config()
    config.runs = runs
    with pytest.raises(UserError) as error:
        expand_runs(config)
    assert message in str(error.value)


# --- files --------------------------------------------------------------------------------------------------------


def test_the_mqar_configs_are_there():
    wanted = {
        f"mqar/{n}" for n in ("attention", "sliding_window", "based", "base_conv", "hyena", "demo")
    }
    assert wanted <= set(available())


@pytest.mark.parametrize("name", available())
def test_a_config_is_a_claim_with_its_command(name):
    text = find_config(name).read_text()
    assert f"python -m train --config {name} --workdir" in text
    for word in ("Expected:", "Time:"):
        assert word in text


def test_a_path_wins_over_a_name(tmp_path, monkeypatch):
    body = "from train.config import base_config\ndef get_config():\n    c = base_config()\n    c.steps = 3\n    return c\n"
    (tmp_path / "mqar").mkdir()
    (tmp_path / "mqar" / "based").write_text(body)
    (tmp_path / "own.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    assert find_config("mqar/hyena").is_absolute()
    assert str(find_config("mqar/based")) == "mqar/based"
    assert load_config("own.py").steps == 3
    assert load_config(str(tmp_path / "own.py")).steps == 3


def test_a_name_may_end_in_py():
    assert find_config("mqar/based.py") == find_config("mqar/based")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mqar/basde", "did you mean mqar/based?"),
        ("based", "did you mean mqar/based?"),
        ("qqqq", "known configs: mqar/attention, "),
    ],
)
def test_an_unknown_config_names_the_nearest(name, message):
    with pytest.raises(UserError) as error:
        load_config(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = ", "bad.py:1: SyntaxError"),
        ("x = 1", "has no get_config()"),
        ("def get_config():\n    return {}", "returned dict, not a ConfigDict"),
        ("def get_config():\n    return 1 / 0", "bad.py:2: ZeroDivisionError: division by zero"),
        (
            "from train.config import base_config\ndef get_config():\n    c = base_config()\n    c.model.d_modle = 3",
            'bad.py:4: AttributeError: Key "d_modle" does not exist',
        ),
    ],
)
def test_a_broken_config_file_is_one_line(tmp_path, body, message):
    (tmp_path / "bad.py").write_text(body)
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path / "bad.py"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- variants -----------------------------------------------------------------------------------------------------

VARIED = """
from train.config import base_config
VARIANTS = {}
def get_config(variant{}):
    config = base_config()
    config.steps = {{"long": 9, "short": 2}}[variant]
    return config
"""


@pytest.fixture
def varied(tmp_path):
    path = tmp_path / "varied.py"
    path.write_text(VARIED.format("('long', 'short')", "='long'"))
    return path


def test_a_variant_stands_after_a_colon(varied):
    assert variants(str(varied)) == ["long", "short"]
    assert load_config(str(varied)).steps == 9
    assert load_config(f"{varied}:short").steps == 2


def test_variants_may_be_the_keys_of_a_dict(varied):
    varied.write_text(VARIED.format("{'long': 1, 'short': 2}", ""))
    assert variants(str(varied)) == ["long", "short"]
    with pytest.raises(UserError, match=r"needs a variant, --config .*varied\.py:long"):
        load_config(str(varied))


def test_a_file_of_the_whole_name_wins(varied, tmp_path):
    other = tmp_path / "varied.py:short"
    other.write_text("from train.config import base_config as get_config")
    assert split_variant(str(other)) == (str(other), None)
    assert split_variant("mqar/based_fig2:reduced") == ("mqar/based_fig2", "reduced")
    assert split_variant("mqar/based") == ("mqar/based", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mqar/based_fig2:redcued",
            "mqar/based_fig2 has no variant 'redcued'; its variants are full, reduced",
        ),
        ("mqar/based_fig2:", "its variants are full, reduced"),
        ("mqar/demo:reduced", "mqar/demo has no variants; write --config mqar/demo without"),
        ("mqar/basde:reduced", "did you mean mqar/based?"),
    ],
)
def test_an_unknown_variant_is_one_line(name, message):
    with pytest.raises(UserError) as error:
        load_config(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_may_refuse_a_variant_itself(varied):
    """Without VARIANTS the file says what is wrong, and a word it does not expect is one line, too."""
    text = VARIED.format("None", "='long'").replace("VARIANTS = None", "")
    varied.write_text(text)
    with pytest.raises(UserError, match=r"varied\.py:6: KeyError: odd"):
        load_config(f"{varied}:odd")
    assert variants(str(varied)) == []


def test_the_help_lists_variants():
    assert "mqar/based_fig2[:full|reduced]" in help_text()
    assert "  mqar/demo\n" in help_text()
