"""The sweep benchmark: both sides move, the table and the sentences say what the numbers are, bad options are one line."""

import argparse

import pytest

from eval.bench import add_arguments, run, sweep
from eval.bench.train_step import Case
from train.errors import UserError


def options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--sweep", *words])


def test_a_grid_is_timed_per_step_and_point():
    side = sweep.GridSteps(Case("attention", 16, 4, 2), points=2)
    taken = side.time_calls(calls=2, steps=3)
    assert side.step == 6
    assert [int(side.grid.take(side.state, i).step) for i in (0, 1)] == [6, 6]
    assert {name: len(values) for name, values in taken.items()} == {"seconds": 2, "processor": 2}
    assert all(value > 0 for values in taken.values() for value in values)


def test_rates_are_the_papers():
    assert sweep.rates(3) == [1e-4, 1e-3, 1e-2]


def test_what_the_numbers_say(capsys):
    def spreads(seconds):
        spread = {"median": seconds, "lower": 0.9 * seconds, "upper": 2 * seconds}
        return {"seconds": spread, "processor": spread}

    def row(mixer, point):
        measured = sweep.Spreads(spreads(0.010), spreads(point))
        ratios = {"ratio": measured.ratio, "processor_ratio": measured.processor_ratio}
        sides = {"single": measured.single, "point": measured.point}
        return {**Case(mixer, 64, 256)._asdict(), "points": 4, **sides, **ratios}

    rows = [row("attention", 0.0102), row("based", 0.0120)]
    rows[0]["commands"] = {"steps": 9, "runs_seconds": 40.0, "sweep_seconds": 30.0}
    assert sweep.findings(rows) == [
        "a point costs more than 1.05 of a single run: based (1.200)",
        "attention: the sweep takes 0.75 of the time of its runs one by one",
    ]
    assert "at most 1.05" in sweep.findings(rows[:1])[0]
    cells = [list(column.cells) for column in sweep.table(rows).columns]
    assert cells[:2] == [["attention", "based"], ["64x256", "64x256"]]
    assert [cell[0] for cell in cells[3:7]] == [
        "10.0 (9.00..20.0)",
        "10.2 (9.18..20.4)",
        "1.020",
        "1.020",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--points", "1"], "--points must be at least 2, not 1"),
        (["--sweep_steps", "-1"], "--sweep_steps must not be negative"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--mixers", "hyena"], "--mixers hyena has no peer"),
        (["--shapes", "64"], "--shapes 64 is not LENGTHxBATCH"),
    ],
)
def test_options_that_cannot_be(words, says):
    with pytest.raises(UserError, match=says):
        run(options(*words))
