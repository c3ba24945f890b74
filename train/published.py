"""The points of the papers' MQAR figures, to draw ours beside them.

Nobody published the numbers behind the figures. These are READ OFF THE PICTURES: accurate to about .003 in RECALL_MEMORY
and .02 in ACCURACY_WIDTH; the ones marked `approximate` hide under another marker and are known less well. The bytes of
RECALL_MEMORY are exact, because they follow from the configs (`jaxmodels.state_size.legacy_state_bytes` gives the same).
An accuracy is the best of four learning rates, one seed.

Sources: RECALL_MEMORY, the recall-memory plot in the README of HazyResearch/zoology, which has the setting of figure 2 of
BASED (arXiv 2402.18668) and newer mixers besides; ACCURACY_WIDTH, figure 2 of Zoology (arXiv 2312.04927).
"""

from typing import NamedTuple


class RecallPoint(NamedTuple):
    """A point of the recall-memory figure: mean accuracy over the seven test segments of BASED's figure 2.

    mixer: as in `jaxmodels.mixers.registry`, or the name it would have there.
    label: what sets the point apart from the others of its mixer, "d=64 f=16".
    state_bytes: by the papers' count, for one sequence of 1,024 tokens.
    """

    mixer: str
    label: str
    state_bytes: int
    accuracy: float
    approximate: bool = False


class WidthPoint(NamedTuple):
    """A point of Zoology's figure 2: accuracy of a model of width d_model on rows of `length` tokens."""

    mixer: str
    length: int
    d_model: int
    accuracy: float
    approximate: bool = False


# (d, f), bytes, accuracy
_BASED = (
    ((48, 8), 9_396, 0.667),
    ((64, 8), 12_468, 0.719),
    ((128, 8), 24_756, 0.840),
    ((48, 16), 30_564, 0.836),
    ((64, 16), 40_548, 0.912),
    ((48, 24), 64_276, 0.856),
    ((128, 16), 80_484, 0.985),
    ((64, 24), 85_268, 0.970),
    ((64, 32), 146_628, 0.966),
    ((256, 16), 160_356, 0.991),
    ((128, 24), 169_236, 0.991),
    ((128, 32), 291_012, 0.996),
    ((64, 64), 558_468, 0.975),
    ((256, 32), 579_780, 1.0),
    ((128, 64), 1_108_356, 0.999),
    ((256, 64), 2_208_132, 1.0),
)
# Zoology's w, which lets a token see w + 1 keys; bytes, accuracy
_SLIDING_WINDOW = (
    (8, 9_728, 0.081),
    (16, 17_920, 0.145),
    (32, 34_304, 0.310),
    (64, 67_072, 0.514),
    (128, 132_608, 0.655),
    (256, 263_680, 0.797),
    (512, 525_824, 0.936),
)
_OTHERS = (
    RecallPoint("attention", "d=64", 525_056, 1.0),
    RecallPoint("attention", "d=128", 1_050_112, 1.0),
    RecallPoint("hyena", "d=64", 524_288, 0.185),
    RecallPoint("hyena", "d=128", 1_048_576, 0.304),
    RecallPoint("hyena", "d=256", 2_097_152, 0.409),
    RecallPoint("h3", "d=64", 8_192, 0.189),
    RecallPoint("h3", "d=128", 32_768, 0.248),
    RecallPoint("h3", "d=256", 131_072, 0.247),
    RecallPoint("h3", "d=64 N=1024", 524_288, 0.129),
    RecallPoint("h3", "d=128 N=1024", 1_048_576, 0.229),
    RecallPoint("h3", "d=256 N=1024", 2_097_152, 0.279),
    RecallPoint("gla", "d=64", 4_864, 0.532),
    RecallPoint("gla", "d=128", 17_920, 0.771),
    RecallPoint("gla", "d=256", 68_608, 0.950),
    RecallPoint("delta_net", "d=64", 8_960, 0.793),
    RecallPoint("delta_net", "d=128", 34_304, 0.963),
    RecallPoint("delta_net", "d=256", 134_144, 0.995),
    RecallPoint("gated_delta_net", "d=64", 17_152, 0.890),
    RecallPoint("gated_delta_net", "d=128", 67_072, 0.988),
    RecallPoint("gated_delta_net", "d=256", 265_216, 0.994),
    # the bytes are those of the states; the figure had counted some of them 4 or 16 times too large
    RecallPoint("rwkv7", "d=64", 17_152, 0.816),
    RecallPoint("rwkv7", "d=128", 34_304, 0.915),
    RecallPoint("rwkv7", "d=256", 68_608, 0.981),
    RecallPoint("mamba", "", 16_384, 0.695, approximate=True),
    RecallPoint("mamba", "", 24_576, 0.697),
    RecallPoint("mamba", "", 49_152, 0.758),
    RecallPoint("mamba", "", 98_304, 0.851, approximate=True),
    *(
        RecallPoint("mamba2", "", size, accuracy)
        for size, accuracy in (
            (8_192, 0.520),
            (16_384, 0.690),
            (24_576, 0.728),
            (32_768, 0.784),
            (49_152, 0.796),
            (65_536, 0.832),
            (98_304, 0.844),
        )
    ),
)

RECALL_MEMORY: tuple[RecallPoint, ...] = (
    *(RecallPoint("based", f"d={d} f={f}", size, accuracy) for (d, f), size, accuracy in _BASED),
    *(
        RecallPoint("sliding_window", f"d=128 w={w}", size, accuracy)
        for w, size, accuracy in _SLIDING_WINDOW
    ),
    RecallPoint("sliding_window", "d=128 w=1024", 1_050_112, 1.0, approximate=True),
    *_OTHERS,
)

# (mixer, length) -> accuracy at d = 64, 128, 256, 512; "~": approximate
_WIDTHS = (64, 128, 256, 512)
_WIDTH_ROWS = {
    ("attention", 64): "1 1 1 1",
    ("attention", 128): "1 1 1 1",
    ("attention", 256): "1 1 1 1",
    ("attention", 512): "1 1 1 1",
    ("hyena", 64): ".52 .75 .84 .86",
    ("hyena", 128): "~.18 .66 ~.74 .84",
    ("hyena", 256): "~.05 .13 .54 .69",
    ("hyena", 512): "~.01 .03 .09 .18",
    ("rwkv4", 64): ".76 ~.94 ~.96 ~.99",
    ("rwkv4", 128): ".18 .50 .75 ~.93",
    ("rwkv4", 256): ".05 .06 .67 .79",
    ("rwkv4", 512): ".01 .02 .15 .37",
    ("h3", 64): ".93 1 ~.99 ~.98",
    ("h3", 128): ".25 .74 .91 .76",
    ("h3", 256): "~.09 .64 .61 ~.67",
    ("h3", 512): "~.01 .01 .02 .09",
    ("base_conv", 64): ".70 .94 .96 1",
    ("base_conv", 128): ".38 .61 .84 .96",
    ("base_conv", 256): ".14 .34 .81 .94",
    ("base_conv", 512): "~.01 .01 ~.05 .71",
}

ACCURACY_WIDTH: tuple[WidthPoint, ...] = tuple(
    WidthPoint(mixer, length, d_model, float(text.lstrip("~")), approximate=text.startswith("~"))
    for (mixer, length), row in _WIDTH_ROWS.items()
    for d_model, text in zip(_WIDTHS, row.split(), strict=True)
)
