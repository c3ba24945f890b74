"""The papers' points, against the state sizes that the configs of the papers give."""

import numpy as np
import pytest

from jaxmodels.models.language_model import build_language_model
from jaxmodels.state_size import legacy_state_bytes
from train.published import ACCURACY_WIDTH, RECALL_MEMORY

CONV = {"name": "base_conv", "kernel_size": 3}


def layers(mixer, fields):
    return {
        "based": lambda: [CONV, {"name": "based", "feature_dim": fields["f"]}],
        "sliding_window": lambda: [CONV, {"name": "sliding_window", "window": fields["w"]}],
        "attention": lambda: [CONV, {"name": "attention"}],
        "hyena": lambda: [{"name": "hyena", "max_len": 1024}],
    }[mixer]()


@pytest.mark.parametrize("point", RECALL_MEMORY, ids=lambda p: f"{p.mixer} {p.label}")
def test_the_bytes_of_a_point_are_those_of_its_label(point):
    if point.mixer not in ("based", "sliding_window", "attention", "hyena"):
        assert point.state_bytes % 4 == 0
        return
    fields = {key: int(value) for key, value in (part.split("=") for part in point.label.split())}
    mixers = layers(point.mixer, fields)
    model = build_language_model(vocab_size=8, d_model=fields["d"], num_layers=2, mixers=mixers)
    assert legacy_state_bytes(model, 1024) == point.state_bytes


def test_every_point_is_there_once():
    counts = {mixer: sum(p.mixer == mixer for p in RECALL_MEMORY) for mixer, *_ in RECALL_MEMORY}
    assert {m: counts[m] for m in ("based", "sliding_window", "attention", "hyena")} == {
        "based": 16,
        "sliding_window": 8,
        "attention": 2,
        "hyena": 3,
    }
    assert len({(p.mixer, p.state_bytes) for p in RECALL_MEMORY}) == len(RECALL_MEMORY)
    assert all(0 < p.accuracy <= 1 for p in (*RECALL_MEMORY, *ACCURACY_WIDTH))


def test_the_figure_of_zoology_is_a_full_grid():
    grid = {(p.mixer, p.length, p.d_model): p for p in ACCURACY_WIDTH}
    assert len(grid) == len(ACCURACY_WIDTH) == 5 * 4 * 4
    assert grid["base_conv", 512, 512] == ("base_conv", 512, 512, 0.71, False)
    assert grid["hyena", 128, 256] == ("hyena", 128, 256, 0.74, True)  # ~.74 in the notes
    mean = {
        m: np.mean([p.accuracy for p in ACCURACY_WIDTH if p.mixer == m])
        for m in ("attention", "base_conv", "hyena")
    }
    assert mean["attention"] == 1
    assert mean["attention"] > mean["base_conv"] > mean["hyena"]  # the claim of the figure
