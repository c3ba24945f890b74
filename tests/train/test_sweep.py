"""What a sweep trains: names, products, the config of each point, and one line for every axis that cannot be."""

import json

import pytest

from train.check import check
from train.config import base_config, dumps, from_plain
from train.config_paths import set_key
from train.errors import UserError
from train.ledger import Ledger
from train.sweep import expand_jobs


def config_of(*sweep, runs=(), **keys):
    config = base_config()
    for path, value in keys.items():
        set_key(config, path, value)
    config.sweep, config.runs = tuple(sweep), tuple(runs)
    return config


def names(*sweep, **kwargs):
    return {
        job.name: [p.name for p in job.points] for job in expand_jobs(config_of(*sweep, **kwargs))
    }


def test_rates_and_seeds_are_points_of_one_job_and_other_axes_are_jobs():
    axes = {"learning_rate": [1e-3, 1e-2], "seed": [0, 1], "model.d_model": [64, 128]}
    grid = ["lr=0.001,seed=0", "lr=0.001,seed=1", "lr=0.01,seed=0", "lr=0.01,seed=1"]
    assert names(axes) == {
        job: [f"{job}/{point}" for point in grid] for job in ("d_model=64", "d_model=128")
    }
    assert names({k: axes[k] for k in ("learning_rate", "seed")}) == {"": grid}


def test_every_run_is_swept():
    runs = ({"name": "a", "steps": 5}, {"name": "b"})
    assert names({"model.d_model": [32, 64]}, runs=runs) == {
        f"{run},d_model={d}": [f"{run},d_model={d}"] for run in "ab" for d in (32, 64)
    }
    jobs = expand_jobs(config_of({"seed": [1, 2]}, runs=runs))
    assert [p.name for job in jobs for p in job.points] == [
        f"{r}/seed={s}" for r in "ab" for s in (1, 2)
    ]
    assert [job.config.steps for job in jobs] == [5, 1000]


def test_dicts_of_a_sweep_follow_one_another_and_share_their_jobs():
    assert names(
        {"learning_rate": [1e-3], "seed": [0, 1]}, {"learning_rate": [1e-2], "seed": [0]}
    ) == {"": ["lr=0.001,seed=0", "lr=0.001,seed=1", "lr=0.01,seed=0"]}
    assert names({"seed": [0, 1]}, {"model.d_model": [32]}) == {
        "": ["seed=0", "seed=1"],
        "d_model=32": ["d_model=32"],
    }


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"model.mixers[0].window": [4], "model.mixers[1].window": [8]}, "0.window=4,1.window=8"),
        ({"data.path": ["a/b c.txt"]}, "path=a_b_c.txt"),
        ({"learning_rate": [10 ** (-10 / 3)]}, "lr=0.000464159"),
        ({"model.tie_embeddings": [False]}, "tie_embeddings=False"),
        ({"steps": [1e2]}, "steps=100"),
    ],
)
def test_a_name_is_as_short_as_it_can_be(axes, expected):
    keys = {"model.mixers": [{"name": "sliding_window"}] * 2}
    (job,) = expand_jobs(config_of(axes, **keys))
    assert job.points[0].name == expected


def test_values_that_look_the_same_are_told_apart():
    assert names({"learning_rate": [1e-3, 1.0000001e-3]}) == {"": ["lr=0.001", "lr=0.0010000001"]}
    assert names({"data.path": ["a/b", "a b"]}) == {
        "path=a_b-0": ["path=a_b-0"],
        "path=a_b-1": ["path=a_b-1"],
    }


def test_the_config_of_a_point_trains_it_alone():
    """Its data are the sweep's: only config.seed differs between seeds."""
    jobs = expand_jobs(
        config_of({"learning_rate": [0.1], "seed": [3, 4]}, seed=7, plot="recall_memory")
    )
    one, two = (point.config for point in jobs[0].points)
    assert (one.seed, two.seed, one.data.seed, two.data.seed) == (3, 4, 7, 7)
    assert (one.learning_rate, one.sweep, one.runs, one.plot) == (0.1, (), (), "")
    assert dumps(from_plain(json.loads(dumps(one)))) == dumps(one)
    (job,) = expand_jobs(config_of({"seed": [3]}, **{"data.seed": 9}))
    assert job.config.data.seed == 9
    (job,) = expand_jobs(config_of({"seed": [3]}, **{"data.mode": "zoology"}))
    assert job.config.data.seed is None  # the original's 123, whatever the seed


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        (
            {"model.d_modl": [1]},
            "[0]: no config key config.model.d_modl; did you mean config.model.d_model?",
        ),
        ({"lr": [1]}, "[0]: no config key config.lr"),
        ({"learning_rate": []}, "['learning_rate'] must be a list of at least one value, got []"),
        (
            {"learning_rate": 1e-3},
            "['learning_rate'] must be a list of at least one value, got 0.001",
        ),
        ({"learning_rate": "0.1"}, "must be a list of at least one value, got '0.1'"),
        ({"steps": [10, 1e1]}, "['steps'] holds 10 twice"),
        ({"seed": [0, 1.5]}, "config.seed must be an integer, got 1.5"),
        ({"model": [1]}, "config.model is a group"),
        ({"model.mixers": [[{"name": "based"}]]}, "give such values names in config.runs"),
        ({"model.mixers[7].name": ["based"]}, "index 7 is past the end"),
        ({"runs": [1]}, "'runs' cannot be an axis"),
        ({3: [1]}, "3 cannot be an axis"),
        ({}, "must be a dict of lists"),
        ([1], "must be a dict of lists"),
    ],
)
def test_axes_that_cannot_be(sweep, says):
    with pytest.raises(UserError) as raised:
        expand_jobs(config_of(sweep))
    assert says in str(raised.value)
    assert str(raised.value).startswith("config.sweep[0]")
    assert "\n" not in str(raised.value)


def test_points_of_one_name():
    with pytest.raises(UserError, match=r"train 'seed=0' twice"):
        expand_jobs(config_of({"seed": [0]}, {"seed": [0, 1]}))
    with pytest.raises(UserError, match=r"train 'a,seed=0' twice|train 'a' twice|needs its own"):
        expand_jobs(config_of({"steps": [1]}, runs=({"name": "a"}, {"name": "a"})))


@pytest.mark.parametrize(
    ("sweep", "keys", "says"),
    [
        (
            {"learning_rate": [1e-3, 0.0]},
            {},
            "run 'lr=0': config.learning_rate must be positive, got 0.0",
        ),
        ({"seed": [0, -1]}, {}, "run 'seed=-1': config.seed must be at least 0"),
        (
            {"model.d_model": [64, 0]},
            {},
            "run 'd_model=0': config.model.d_model must be at least 1",
        ),
        ({"seed": [0, 1]}, {"log.wandb": True}, "cannot follow the points of a grid"),
    ],
)
def test_points_that_cannot_be_trained_are_found_before_any_is(sweep, keys, says):
    with pytest.raises(UserError) as raised:
        check(config_of(sweep, **keys))
    assert says in str(raised.value)


def test_ledger(tmp_path, capsys):
    path = tmp_path / "ledger.json"
    ledger = Ledger(path, ["a", "b"])
    ledger.start(["a"])
    points = json.loads(path.read_text())["points"]
    assert {name: entry["status"] for name, entry in points.items()} == {
        "a": "running",
        "b": "waiting",
    }
    ledger.end("a", {"steps": 3, "metrics": {"loss": 1.5}, "wall_seconds": 2.0, "parameters": 9})
    ledger.end("b", {"reason": "no"})
    points = json.loads(path.read_text())["points"]
    finished = {
        "status": "finished",
        "reason": "",
        "steps": 3,
        "metrics": {"loss": 1.5},
        "wall_seconds": 2.0,
    }
    assert points["a"] == finished
    assert (points["b"]["status"], points["b"]["reason"]) == ("failed", "no")
    before = path.stat().st_mtime_ns
    ledger.update({"a": {"status": "finished"}})
    assert path.stat().st_mtime_ns == before  # nothing changed
    assert Ledger(path, ["a", "c"]).points["a"] == finished
    with pytest.raises(ValueError, match="'done' is not one of"):
        ledger.update({"a": {"status": "done"}})
    path.write_text("{")
    assert Ledger(path, ["a"]).points["a"]["status"] == "waiting"
    assert "cannot be read" in capsys.readouterr().err
