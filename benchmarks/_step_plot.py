"""Plot of step_bench: each contender's step in parts, and its memory beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _plots import save, style
from _step_parts import PARTS
from _step_run import StepRecord

_PART_COLOURS = {
    "draw": "#8d99ae",
    "picture": "#6a4c93",
    "text": "#00798c",
    "U-Net forward": "#edae49",
    "loss": "#3d5a3c",
    "backward": "#d1495b",
    "optimiser": "#30a3b5",
}


def plot_steps(records: Sequence[StepRecord], title: str, path: Path) -> None:
    """A row a record: milliseconds by part (a dot for the median in turns), and MiB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 2.6 * len(records) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.subplots(len(records), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), record in zip(grid, records, strict=True):
        shown = [entry for entry in record.entries if entry.timing and entry.memory]
        places = range(len(shown))
        begun = [0.0] * len(shown)
        for part in PARTS:
            lengths = [entry.parts[part] * 1e3 for entry in shown]
            left.barh(places, lengths, 0.62, begun, color=_PART_COLOURS[part], label=part)
            begun = [a + b for a, b in zip(begun, lengths, strict=True)]
        medians = [entry.timing.median * 1e3 for entry in shown if entry.timing]
        left.plot(medians, places, "D", color="#222222", markersize=5, label="whole, in turns")
        held = [entry.memory.held / 2**20 for entry in shown if entry.memory]
        peaks = [entry.memory.peak / 2**20 for entry in shown if entry.memory]
        right.barh(places, peaks, 0.62, color="#c5e3e8", label="peak of a step")
        right.barh(places, held, 0.62, color="#00798c", label="held between steps")
        names = [f"{entry.contender.name} ({entry.contender.letter})" for entry in shown]
        for axes, labels in ((left, names), (right, [""] * len(names))):
            axes.set_yticks(places, labels)
            axes.invert_yaxis()
            style(axes)
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        left.set_title(
            f"{record.built.name}, widths {'/'.join(map(str, record.built.widths))}, latent "
            f"{record.built.latent}, batch {record.batch}, {record.dtype}",
            fontsize=10,
        )
        left.set_xlabel("ms")
        right.set_xlabel("MiB")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    grid[0][1].legend(fontsize=9, frameon=False, loc="lower right")
    save(figure, path)
