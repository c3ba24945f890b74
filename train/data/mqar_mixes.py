"""The segment mixes of the papers, as values for config.data.train and config.data.test.

Sizes and counts as in the published configs of HazyResearch/zoology: `iclr24_zoology_figure2` (Zoology, figure 2: one
run per length) and `arxiv24_based_figure2` (BASED, figure 2: one run on the whole mix, easy segments first).
"""

from typing import Any


def segments(num_examples: int | None, *sizes: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    """A mix of (length, num_kv_pairs) of the same number of examples each."""
    return tuple(
        {"length": length, "num_kv_pairs": pairs, "num_examples": num_examples}
        for length, pairs in sizes
    )


# length -> the run of that length; all without random filler (config.data.random_non_queries = False)
ZOOLOGY_FIG2: dict[int, dict[str, Any]] = {
    length: {
        "train": segments(100_000, (length, pairs)),
        "test": segments(3_000, (length, pairs)),
        "batch_size": batch_size,
        "random_non_queries": False,
    }
    for length, pairs, batch_size in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128))
}

# batch 256 in training, 32 in the test, with random filler
BASED_FIG2_TRAIN = segments(100_000, (64, 4)) + segments(
    20_000, (128, 8), (256, 16), (256, 32), (256, 64)
)
BASED_FIG2_TEST = segments(
    1_000, (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)
)
