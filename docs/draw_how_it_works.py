"""Draw docs/images/how-it-works.png, the README's figure of the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TRAINED, FROZEN, FUSED, PAPER = "#f6c9a8", "#d5e3f3", "#cfe8d3", "#f4f4f2"
INK, RED = "#26262b", "#b3471d"
PROMPTS = (
    (43, "a photo of a person", "reference prompt", "Wᵏ → K_r"),
    (32, "a photo of a <me>", "K prompt, stage i", "Wᵏ → K"),
    (13, "a photo of a <me>", "V prompt, stage i", "Wᵛ → V"),
)
LEGEND = ((2, TRAINED, "trained"), (14, FROZEN, "frozen"), (26, FUSED, "sefi_fast"))


def frame(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], color: str,
    rounding: float = 1, width: float = 0.9,
) -> None:  # fmt: skip
    """Draw a rounded box."""
    style = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(
        FancyBboxPatch(
            corner, *size, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=width
        )
    )


def text(axes: Axes, x: float, y: float, words: str, size: float = 8, **style: Any) -> None:
    """Write words with their center at a point."""
    centered = {"ha": "center", "va": "center", "color": INK}
    axes.text(x, y, words, fontsize=size, **(centered | style))


def box(
    axes: Axes, x: float, y: float, width: float, height: float, words: str, color: str,
    size: float = 9.5, **style: Any,
) -> None:  # fmt: skip
    """Draw a box around words."""
    frame(axes, (x, y), (width, height), color)
    text(axes, x + width / 2, y + height / 2, words, size, **style)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK,
    bend: float = 0.0,
) -> None:  # fmt: skip
    """Draw an arrow."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, linewidth=1.2, color=color,
            connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def draw() -> Figure:
    """Draw the figure: prompts on the left, the kernel on the right."""
    figure = Figure(figsize=(11, 5.6), dpi=140)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 110), ylim=(0, 56))
    axes.axis("off")
    box(axes, 2, 23, 15, 8, "subject tokens\n5 stages × (K, V)", TRAINED)
    text(axes, 9.5, 20.6, "the only thing trained,\nthe only thing saved", va="top")
    for y, sentence, label, _ in PROMPTS:
        box(axes, 22, y, 19, 7, sentence, PAPER, style="italic")
        text(axes, 22.3, y + 7.6, label, ha="left", va="baseline")
        box(axes, 46, y, 13, 7, "text transformer", FROZEN)
        arrow(axes, (41, y + 3.5), (46, y + 3.5))
    arrow(axes, (17, 28.5), (22, 34.5), RED, -0.15)
    arrow(axes, (17, 25.5), (22, 17.5), RED, 0.15)
    for y, _, _, projection in PROMPTS:
        box(axes, 63, y, 10, 7, projection, FROZEN)
        arrow(axes, (59, y + 3.5), (63, y + 3.5))
    frame(axes, (77, 9.5), (20, 43), FUSED, rounding=1.5, width=1.4)
    text(axes, 87, 50.2, "one fused kernel", 10.5, weight="bold", color="black")
    box(axes, 79.5, 41.5, 15, 6.2, "A_r = softmax(Q K_rᵀ)", "white", 8.5)
    box(axes, 79.5, 31, 15, 6.2, "A_t = softmax(Q Kᵀ)", "white", 8.5)
    box(axes, 79.5, 12.5, 15, 6.2, "O = A_t V", "white", 8.5)
    text(axes, 87, 25, "rows of 77 probabilities\nlive and die on chip")
    for level in (44.6, 34.1, 15.6):
        arrow(axes, (73, level + (1.2 if level < 20 else 1.0)), (79.5, level))
    arrow(axes, (87, 31), (87, 28))
    arrow(axes, (87, 22.4), (87, 18.7))
    box(axes, 62, 2, 12, 5.5, "image queries Q", PAPER, 8.5)
    arrow(axes, (74, 4.75), (85, 9.5), bend=0.15)
    arrow(axes, (94.5, 44.6), (102, 41.2), bend=-0.2)
    arrow(axes, (94.5, 34.1), (102, 37.6), bend=0.2)
    text(axes, 103.6, 39.4, "λ·‖A_t − A_r‖²", 9.5, color="black")
    text(axes, 103.6, 47, "subject-wise loss", color="black")
    arrow(axes, (94.5, 15.6), (100, 15.6))
    text(axes, 104.5, 15.6, "to the\nfrozen U-Net", 9, color="black")
    for x, color, label in LEGEND:
        box(axes, x, 3, 3, 3, "", color)
        text(axes, x + 4, 4.5, label, 8.5, ha="left", color="black")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).parent / "images" / "how-it-works.png")
