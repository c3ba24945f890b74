"""results.csv, results.parquet, best.csv and the picture of the learning rates, from points with numbers made up here."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from train.config import base_config, dumps
from train.errors import UserError
from train.ledger import Ledger
from train.sweep import expand_jobs
from train.sweep_plots import learning_rates
from train.sweep_results import best_of, read_best_points, rows_of, statistics, write_results

ACCURACY = {  # run, learning rate -> accuracy of seeds 0 and 1; None failed
    ("a", 0.001): (0.5, 0.7),
    ("a", 0.01): (0.9, 0.2),
    ("b", 0.001): (0.1, 0.3),
    ("b", 0.01): (0.99, None),
}


@pytest.fixture
def sweep(tmp_path):
    """(jobs, ledger) of two runs whose points are finished as ACCURACY says."""
    config = base_config()
    config.runs = ({"name": "a"}, {"name": "b", "model.mixers": [{"name": "based"}]})
    config.sweep = ({"learning_rate": [0.001, 0.01], "seed": [0, 1]},)
    jobs = expand_jobs(config)
    ledger = Ledger(tmp_path / "ledger.json", [p.name for job in jobs for p in job.points])
    for job in jobs:
        for point in job.points:
            value = ACCURACY[job.name, point.axes["learning_rate"]][point.axes["seed"]]
            folder = tmp_path / point.name
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(dumps(point.config))
            if value is None:
                ledger.end(point.name, {"reason": "blew, up"})
                continue
            summary = {
                "metrics": {"eval/accuracy": value, "eval/loss": 1 - value, "learning_rate": 0.0},
                "metric": ["eval/accuracy", "max"],
                "steps": 10,
                "parameters": 100,
                "state_bytes": 64,
                "legacy_state_bytes": 64,
                "wall_seconds": 1.5,
            }
            (folder / "summary.json").write_text(json.dumps(summary))
            ledger.end(point.name, summary)
    return jobs, ledger


def test_files(sweep, tmp_path):
    rows = rows_of(*(sweep[0], tmp_path, sweep[1]))
    write_results(rows, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 8
    assert read[2]["point"] == "a/lr=0.01,seed=0"
    assert (read[2]["learning_rate"], read[2]["seed"], read[2]["eval/accuracy"]) == (
        "0.01",
        "0",
        "0.9",
    )
    assert (read[7]["status"], read[7]["reason"], read[7]["eval/accuracy"]) == (
        "failed",
        "blew, up",
        "",
    )
    assert (read[7]["mixer"], read[7]["d_model"]) == ("based", "64")
    table = pq.read_table(tmp_path / "results.parquet").to_pydict()
    assert table["eval/accuracy"] == [0.5, 0.7, 0.9, 0.2, 0.1, 0.3, 0.99, None]
    assert table["run"] == ["a"] * 4 + ["b"] * 4
    assert table["parameters"] == [100] * 7 + [None]


def test_the_best_rate_has_the_best_mean_and_no_failed_seed(sweep, tmp_path):
    rows = rows_of(sweep[0], tmp_path, sweep[1])
    a, b = best_of(rows)
    assert (a.learning_rate, a.mean, a.lowest, a.highest, a.seeds) == (0.001, 0.6, 0.5, 0.7, 2)
    assert (b.learning_rate, b.mean, b.failed) == (0.001, 0.2, 0)
    losses = [{**row, "metric": "eval/loss", "mode": "min"} for row in rows]
    assert best_of(losses)[0].mean == pytest.approx(0.4)
    write_results(rows, tmp_path)
    points = read_best_points(tmp_path)
    assert [(p.name, p.mixer, p.accuracy) for p in points] == [
        ("a", "attention", 0.6),
        ("b", "based", 0.2),
    ]


def test_best_points_need_the_file(tmp_path):
    with pytest.raises(UserError, match=r"best\.csv is missing; the training command"):
        read_best_points(tmp_path)
    (tmp_path / "best.csv").write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match="is not what a sweep writes"):
        read_best_points(tmp_path)


def test_picture_of_the_learning_rates(sweep, tmp_path):
    rates = statistics(rows_of(sweep[0], tmp_path, sweep[1]))
    path = tmp_path / "plots" / "learning_rates.png"
    assert learning_rates(rates, path, {"a": "attention", "b": "based"}) == path
    assert path.stat().st_size > 10_000
    one = {"a": rates["a"][:1]}
    assert learning_rates(one, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
