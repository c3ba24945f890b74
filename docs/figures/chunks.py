"""Draws chunks.png, the figure of docs/kernels.md: what a chunk computes and what it is handed.

python docs/figures/chunks.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

CHUNKS, INSIDE, BEFORE, STATE = 4, "#0072b2", "#cfe3f1", "#d55e00"


def draw(path: Path) -> None:
    """Left: the causal square of weights. Right: the same sum as a chain of states."""
    figure, (square, chain) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1, 1.35))
    for i in range(CHUNKS):
        top = CHUNKS - i
        square.add_patch(Polygon([(i, top), (i, top - 1), (i + 1, top - 1)], color=INSIDE))
        if i:
            square.add_patch(Rectangle((0, top - 1), i, 1, facecolor=BEFORE, edgecolor="white"))
    square.plot([0, CHUNKS], [CHUNKS, 0], color="black", linewidth=0.8)
    square.set(xlim=(0, CHUNKS), ylim=(0, CHUNKS), xlabel="keys", ylabel="queries (downwards)")
    square.set_title(
        "weights 1 + s + s²/2: linear in t,\nbecause the light part is one product with S",
        fontsize=10,
    )
    square.text(0.95, 0.45, "φ(q)ᵀ S", ha="center", va="center")
    square.text(2.04, 1.12, "A [v, 1]", ha="left", color="white", fontsize=8)

    for i in range(CHUNKS):
        x = 2.4 * i
        chain.add_patch(Rectangle((x, 0), 1.4, 1, facecolor=INSIDE))
        chain.text(x + 0.7, 0.5, f"chunk {i + 1}", ha="center", va="center", color="white")
        chain.text(x + 0.7, -0.75, "q, k, v", ha="center", va="center")
        chain.text(x + 0.7, 1.75, "y", ha="center", va="center")
        _arrow(chain, (x + 0.7, -0.5), (x + 0.7, 0), "black")
        _arrow(chain, (x + 0.7, 1), (x + 0.7, 1.5), "black")
        _arrow(chain, (x + 1.4, 0.5), (x + 2.4, 0.5), STATE)
        chain.text(x + 1.9, 0.72, f"S{'₁₂₃₄'[i]}", ha="center", color=STATE)
    chain.set(xlim=(-0.1, 2.4 * CHUNKS + 0.2), ylim=(-2.4, 3.2))
    chain.text(
        2.4 * CHUNKS / 2,
        -1.7,
        "S, [1 + f + f(f+1)/2, v + 1] in float32, never leaves the chip:\nS += φ(k)ᵀ [v, 1] after a chunk has read it",
        ha="center",
        va="center",
        color=STATE,
        fontsize=9,
    )
    chain.set_title(
        "a kernel walks over the chunks; the features φ exist for one at a time", fontsize=10
    )
    for axes in (square, chain):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(axes is square)
        axes.set_aspect("equal")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _arrow(axes, start, end, color):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color))


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
