"""Points of finished runs, the sentence they support, and the pictures."""

import itertools
import json

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import base_config, dumps
from train.errors import UserError
from train.logs import metrics_line
from train.plots import STYLES, bytes_text, learning_curves, recall_memory, spread
from train.points import Point, claim, describe, detail_labels, read_points


def finished_run(folder, mixers, accuracy, d_model=64, **summary):
    folder.mkdir(parents=True, exist_ok=True)
    config = base_config()
    config.model.d_model = d_model
    config.model.mixers = mixers
    (folder / "config.json").write_text(dumps(config))
    content = {
        "metrics": {"eval/accuracy": accuracy},
        "state_bytes": 4000,
        "parameters": 9,
        **summary,
    }
    (folder / "summary.json").write_text(json.dumps(content))


def based(f):
    return [{"name": "base_conv", "kernel_size": 3}, {"name": "based", "feature_dim": f}]


def test_points_come_from_the_files_of_the_runs(tmp_path):
    finished_run(tmp_path / "b16", based(16), 0.9, state_bytes=1234)
    finished_run(tmp_path / "b8", based(8), 0.8)
    (tmp_path / "half").mkdir()  # started, not finished
    (tmp_path / "half" / "config.json").write_text(dumps(base_config()))
    (tmp_path / "summary.json").write_text(json.dumps({"runs": {}}))  # the suite's own
    first, second = read_points(tmp_path)
    assert first == Point("b16", "based", 1234, 0.9, {"f": 16, "d": 64})
    assert second.name == "b8"
    assert detail_labels([first, second]) == {"b16": "f=16", "b8": "f=8"}
    assert read_points(tmp_path / "b16") == [first]  # one run is a directory of one


def test_the_mixer_is_that_of_the_last_layer(tmp_path):
    finished_run(tmp_path, [{"name": "hyena"}], 0.5)
    (point,) = read_points(tmp_path)
    assert point.mixer == "hyena"
    assert detail_labels([point]) == {point.name: ""}


def test_a_figure_says_what_its_runs_have_in_common(tmp_path):
    finished_run(tmp_path / "a", based(8), 0.8)
    finished_run(tmp_path / "b", based(16), 0.8)
    text = "MQAR, 64 tokens with 4 pairs, vocabulary 8192"
    assert describe(read_points(tmp_path)) == f"{text}, width 64"
    finished_run(tmp_path / "wide", based(16), 0.8, d_model=128)
    assert describe(read_points(tmp_path)) == text
    assert describe([Point("made up", "based", 1, 1.0)]) == ""


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "no directory"),
        (lambda d: d.mkdir(), "holds no finished run"),
        (lambda d: finished_run(d, based(8), None), "holds no finished run"),
        (
            lambda d: (finished_run(d, based(8), 1.0), (d / "summary.json").write_text("{")),
            "summary.json is not readable JSON",
        ),
    ],
)
def test_directories_without_points(tmp_path, prepare, message):
    prepare(tmp_path / "runs")
    with pytest.raises(UserError, match=message):
        read_points(tmp_path / "runs")


def points(**accuracies):
    return [
        Point(f"{m}{i}", m, 10.0 ** (i + 3), a)
        for m, all_ in accuracies.items()
        for i, a in enumerate(all_)
    ]


@pytest.mark.parametrize(
    ("accuracies", "sentence"),
    [
        ({"attention": [1.0]}, "Attention solves associative recall"),
        (
            {"attention": [1.0], "based": [0.4, 0.99], "base_conv": [0.5], "hyena": [0.3]},
            "Attention solves associative recall, BASED given enough state; BaseConv and Hyena do not",
        ),
        (
            {"attention": [1.0], "based": [0.98], "hyena": [0.3]},
            "Attention and BASED solve associative recall; Hyena does not",
        ),
        (
            {"sliding_window": [0.1, 1.0]},
            "Sliding window solves associative recall given enough state",
        ),
        ({"hyena": [0.94]}, "No mixer solves associative recall here"),
        (
            {"a_new_one": [1.0], "b": [1.0], "c": [1.0]},
            "A new one, b and c solve associative recall",
        ),
    ],
)
def test_the_title_says_what_the_points_say(accuracies, sentence):
    assert claim(points(**accuracies)) == sentence


def test_recall_memory_draws_whole_files(tmp_path):
    some = points(attention=[1.0], based=[0.2, 0.7, 1.0], unheard_of=[0.5])
    path = recall_memory(some, tmp_path / "new" / "figure.png")
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    for mixer in ("attention", "based"):  # each colour is there
        colour = [int(STYLES[mixer][0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels - colour).max(-1) < 0.02).sum() > 100
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


def test_a_drawing_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = recall_memory(points(based=[0.2]), tmp_path / "figure.png")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        recall_memory(points(based=[0.9]), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_labels_keep_off_each_other(tmp_path, monkeypatch):
    """Ten points in a heap: the labels that are drawn do not overlap."""
    kept = []
    monkeypatch.setattr("train.plots._save", lambda figure, path: kept.append(figure) or path)
    heap = [Point(f"m{i}", f"m{i}", 1000 * (1 + i % 4), 0.3 + 0.15 * (i // 4)) for i in range(10)]
    recall_memory(heap, tmp_path / "figure.png")
    (axes,) = kept[0].axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("m")]
    assert len(boxes) == 10
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_learning_curves_of_a_run_and_of_a_suite(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [
            metrics_line(s, {"train/loss": 1 / s, "eval/accuracy": s / 9}) for s in range(1, 9)
        ]
        lines.insert(3, metrics_line(3, {"train/loss": float("nan")}))
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    finished_run(tmp_path / "one", based(8), 1.0)
    assert learning_curves(tmp_path) == tmp_path / "plots" / "learning_curves.png"
    assert learning_curves(tmp_path / "one") == tmp_path / "one" / "plots" / "learning_curves.png"
    assert (tmp_path / "plots" / "learning_curves.png").stat().st_size > 10_000
    assert learning_curves(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 B"), (5000, "5 kB"), (40_548, "40.5 kB"), (2e6, "2 MB"), (3e9, "3 GB")],
)
def test_bytes_text(count, text):
    assert bytes_text(count) == text


@given(st.lists(st.floats(0, 1), max_size=9))
@settings(max_examples=50, deadline=None)
def test_labels_are_spread_no_more_than_needed(values):
    values = sorted(values)
    places = spread(values, 0.1, -2)
    assert len(places) == len(values)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(places))
    if all(b - a > 0.1 for a, b in itertools.pairwise(values)):
        assert places == pytest.approx(values)
    if values:  # whatever moves up is balanced by what moves down
        assert sum(places) == pytest.approx(sum(values), abs=1e-9)
        assert spread(values, 0.1, 0)[0] >= 0
