"""Draw docs/images/how-it-works.png, the README's one figure of the method."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TRAINED, FROZEN, FUSED, PAPER = "#f6c9a8", "#d5e3f3", "#cfe8d3", "#f4f4f2"
INK = "#26262b"


def main() -> None:
    figure = Figure(figsize=(11, 5.6), dpi=140)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 110), ylim=(0, 56))
    axes.axis("off")

    def box(x, y, width, height, text, colour, size=9.5, style="normal"):
        axes.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=1",
                facecolor=colour,
                edgecolor=INK,
                linewidth=0.9,
            )
        )
        axes.text(
            x + width / 2,
            y + height / 2,
            text,
            ha="center",
            va="center",
            fontsize=size,
            color=INK,
            style=style,
        )

    def arrow(start, end, colour=INK, bend=0.0):
        axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=11,
                linewidth=1.2,
                color=colour,
                connectionstyle=f"arc3,rad={bend}",
                shrinkA=0,
                shrinkB=0,
            )
        )

    box(2, 23, 15, 8, "subject tokens\n5 stages × (K, V)", TRAINED)
    axes.text(
        9.5,
        20.6,
        "the only thing trained,\nthe only thing saved",
        ha="center",
        va="top",
        fontsize=8,
        color=INK,
    )
    prompts = (
        (43, "a photo of a person", "reference prompt"),
        (32, "a photo of a <me>", "K prompt, stage i"),
        (13, "a photo of a <me>", "V prompt, stage i"),
    )
    for y, sentence, label in prompts:
        box(22, y, 19, 7, sentence, PAPER, style="italic")
        axes.text(22.3, y + 7.6, label, fontsize=8, color=INK)
        box(46, y, 13, 7, "text transformer", FROZEN)
        arrow((41, y + 3.5), (46, y + 3.5))
    arrow((17, 28.5), (22, 34.5), "#b3471d", -0.15)
    arrow((17, 25.5), (22, 17.5), "#b3471d", 0.15)
    for y, name in ((43, "Wᵏ → K_r"), (32, "Wᵏ → K"), (13, "Wᵛ → V")):
        box(63, y, 10, 7, name, FROZEN)
        arrow((59, y + 3.5), (63, y + 3.5))
    axes.add_patch(
        FancyBboxPatch(
            (77, 9.5),
            20,
            43,
            boxstyle="round,pad=0,rounding_size=1.5",
            facecolor=FUSED,
            edgecolor=INK,
            linewidth=1.4,
        )
    )
    axes.text(87, 50.2, "one fused kernel", ha="center", va="center", fontsize=10.5, weight="bold")
    box(79.5, 41.5, 15, 6.2, "A_r = softmax(Q K_rᵀ)", "white", 8.5)
    box(79.5, 31, 15, 6.2, "A_t = softmax(Q Kᵀ)", "white", 8.5)
    box(79.5, 12.5, 15, 6.2, "O = A_t V", "white", 8.5)
    axes.text(
        87,
        25,
        "rows of 77 probabilities\nlive and die on chip",
        ha="center",
        va="center",
        fontsize=8,
        color=INK,
    )
    for y in (44.6, 34.1, 15.6):
        arrow((73, y + (1.2 if y < 20 else 1.0)), (79.5, y))
    arrow((87, 31), (87, 28))
    arrow((87, 22.4), (87, 18.7))
    box(62, 2, 12, 5.5, "image queries Q", PAPER, 8.5)
    arrow((74, 4.75), (85, 9.5), bend=0.15)
    arrow((94.5, 44.6), (102, 41.2), bend=-0.2)
    arrow((94.5, 34.1), (102, 37.6), bend=0.2)
    axes.text(103.6, 39.4, "λ·‖A_t − A_r‖²", ha="center", va="center", fontsize=9.5)
    axes.text(103.6, 47, "subject-wise loss", ha="center", va="center", fontsize=8)
    arrow((94.5, 15.6), (100, 15.6))
    axes.text(104.5, 15.6, "to the\nfrozen U-Net", ha="center", va="center", fontsize=9)
    for x, colour, text in (
        (2, TRAINED, "trained"),
        (14, FROZEN, "frozen"),
        (26, FUSED, "sefi_fast"),
    ):
        box(x, 3, 3, 3, "", colour)
        axes.text(x + 4, 4.5, text, va="center", fontsize=8.5)
    figure.savefig(Path(__file__).parent / "images" / "how-it-works.png")


if __name__ == "__main__":
    main()
