"""Points of finished runs, the sentence they support, and the pictures."""

import itertools
import json

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.check import CHOICES
from train.config import base_config, dumps
from train.errors import UserError
from train.logs import metrics_line
from train.plot_labels import spread
from train.plots import (
    PLOTS,
    STYLES,
    accuracy_width,
    based_fig2,
    bytes_text,
    learning_curves,
    recall_memory,
    zoology_fig2,
)
from train.points import Point, claim, describe, detail_labels, read_points, segment_of
from train.published import ACCURACY_WIDTH, RECALL_MEMORY


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
    monkeypatch.setattr("train.plots.save", lambda figure, path: kept.append(figure) or path)
    heap = [Point(f"m{i}", f"m{i}", 1000 * (1 + i % 4), 0.3 + 0.15 * (i // 4)) for i in range(10)]
    recall_memory(heap, tmp_path / "figure.png")
    (axes,) = kept[0].axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("m")]
    assert len(boxes) == 10
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been written."""
    kept = []
    monkeypatch.setattr("train.plots.save", lambda figure, path: kept.append(figure) or path)
    return kept


def overlapping(figure):
    """Pairs of texts of a panel that cover each other."""
    found = []
    for axes in figure.axes:
        texts = [text for text in axes.texts if text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        found += [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]
    return found


def hollow(axes):
    return [line for line in axes.lines if line.get_markerfacecolor() == "none"]


def test_sixty_points_on_a_panel(figures, tmp_path):
    """Every mixer is named, no two texts overlap; which details are left out is for the room to say."""
    mixers = ("based", "sliding_window", "hyena", "attention")
    many = [
        Point(f"{i}", mixers[i % 4], 4000 * 1.12**i, min(1, 0.02 * i), {"f": i, "d": i % 3})
        for i in range(60)
    ]
    recall_memory(many, tmp_path / "figure.png")
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert {"BASED", "sliding window", "Hyena", "attention"} <= set(texts)
    assert 10 < len(texts) < 65
    assert overlapping(figures[0]) == []


def test_full_marks_at_every_size(figures, tmp_path):
    same = [Point(f"b{f}", "based", 10_000 * f, 1.0, {"f": f}) for f in (1, 2, 4, 8, 16)]
    recall_memory([*same, Point("a", "attention", 200_000, 1.0)], tmp_path / "figure.png")
    texts = {text.get_text() for text in figures[0].axes[0].texts}
    assert {"f=1", "f=2", "f=4", "f=8", "f=16", "BASED", "attention"} <= texts
    assert overlapping(figures[0]) == []


def test_the_published_points_are_hollow_and_in_the_colour_of_their_mixer(figures, tmp_path):
    some = points(attention=[1.0], based=[0.2, 0.7, 1.0], unheard_of=[0.5])
    based_fig2(some, tmp_path / "figure.png")
    marks = hollow(figures[0].axes[0])
    colours = [mark.get_markeredgecolor() for mark in marks]
    assert colours.count(STYLES["based"][0]) == 16
    assert colours.count(STYLES["attention"][0]) == 2
    assert len(marks) == 18  # nothing of mixers that are not there
    drawn = {tuple(mark.get_xydata()[0]) for mark in marks}
    assert (40_548, 0.912) in drawn
    assert drawn <= {(p.state_bytes, p.accuracy) for p in RECALL_MEMORY}
    low, high = figures[0].axes[0].get_xlim()
    assert low < 9_396
    assert high > 2_208_132
    assert "hollow: published" in figures[0].axes[0].texts[0].get_text()
    recall_memory(some, tmp_path / "figure.png")
    assert hollow(figures[1].axes[0]) == []


def widths(tmp_path, *runs):
    """Finished runs of (mixer, length, d_model, accuracy), as points."""
    for i, (mixer, length, d_model, accuracy) in enumerate(runs):
        folder = tmp_path / f"run{i}"
        finished_run(folder, [{"name": mixer}], accuracy, d_model)
        config = json.loads((folder / "config.json").read_text())
        config["data"]["test"][0] |= {"length": length, "num_kv_pairs": length // 16}
        (folder / "config.json").write_text(json.dumps(config))
    return read_points(tmp_path)


def test_accuracy_against_width_has_a_panel_for_each_length(figures, tmp_path):
    runs = [
        (m, n, d, a)
        for n in (64, 128, 256)
        for d in (64, 128)
        for m, a in (("attention", 1.0), ("hyena", d / n / 4))
    ]
    some = widths(tmp_path, *runs, ("hyena", 64, 64, 0.9))  # the better of two rates counts
    assert {segment_of(p) for p in some} == {(64, 4), (128, 8), (256, 16)}
    zoology_fig2(some, tmp_path / "figure.png")
    panels = figures[0].axes
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == ["64 tokens, 4 pairs", "128 tokens, 8 pairs", "256 tokens, 16 pairs"]
    for axes, length in zip(panels, (64, 128, 256)):
        published = {(p.d_model, p.accuracy) for p in ACCURACY_WIDTH if p.length == length}
        marks = hollow(axes)
        assert len(marks) == 8  # two mixers at four widths
        assert {tuple(mark.get_xydata()[0]) for mark in marks} <= published
        ours = [line for line in axes.lines if line.get_linestyle() == "-"]
        assert len(ours) == 2
        assert [text.get_text() for text in axes.texts] == ["attention", "Hyena"]
    (first,) = [
        line for line in panels[0].lines
        if line.get_linestyle() == "-" and line.get_color() == STYLES["hyena"][0]
    ]  # fmt: skip
    assert first.get_xydata().tolist() == [[64, 0.9], [128, 0.5]]
    assert overlapping(figures[0]) == []
    assert claim(some, "width") == "Attention solves associative recall; Hyena does not"


def test_what_cannot_be_drawn_is_left_out(figures, tmp_path):
    assert accuracy_width([Point("x", "based", 1, 0.5)], tmp_path / "figure.png") is None
    for draw in PLOTS.values():
        assert draw([], tmp_path / "figure.png") is None
    assert figures == []


def test_a_text_task_is_not_described_as_recall(tmp_path):
    finished_run(tmp_path / "a", based(8), 0.4)
    config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"task": "text"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    some = read_points(tmp_path)
    assert describe(some) == "TEXT, vocabulary 8192, width 64"
    assert claim(some) == "Accuracy against state"
    assert PLOTS["recall_memory"](some, tmp_path / "figure.png").exists()
    assert PLOTS["zoology_fig2"](some, tmp_path / "figure.png").exists()


def test_a_mix_of_many_segments_is_described_by_its_ends(tmp_path):
    finished_run(tmp_path / "a", based(8), 0.4)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["data"]["test"] = [
        {"length": 64 * n, "num_kv_pairs": 4 * n, "num_examples": 9} for n in (1, 2, 3, 4)
    ]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    (point,) = read_points(tmp_path)
    text = "MQAR, 64 tokens with 4 pairs to 256 with 16, vocabulary 8192"
    assert describe([point], width=False) == text
    assert segment_of(point) == (0, 0)


def test_a_config_can_ask_for_every_figure():
    assert set(CHOICES["plot"]) == {"", *PLOTS}


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
