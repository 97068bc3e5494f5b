"""Plots of an attention benchmark: times and memory as bars, rates under the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _record import ProblemRecord
from _report import write_whole
from _roofline import Rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# sefi's backends stand out in warm colours, the rest recede in cool ones and greys.
_COLOURS = {
    "sefi-triton": "#d1495b",
    "sefi-cuda": "#e08e45",
    "sefi-cpu": "#d1495b",
    "sefi-eager": "#edae49",
    "eager-maps": "#8d99ae",
    "eager-compiled": "#5c677d",
    "sdpa": "#00798c",
    "sdpa-flash": "#30a3b5",
    "sdpa-efficient": "#66c2cf",
    "sdpa-cudnn": "#9bdce4",
    "sdpa-math": "#c5e3e8",
    "xformers": "#6a4c93",
    "flex": "#3d5a3c",
}
_OTHER = "#444444"
_INCHES_A_LABEL = 2.2
# A logarithm has no place for a call that allocates nothing.
_LEAST_MIB = 0.1


def style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _names(records: Sequence[ProblemRecord]) -> list[str]:
    found = dict.fromkeys(
        entry.contender for record in records for entry in record.entries if entry.sound
    )
    order = list(_COLOURS)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _grouped(
    axes: Axes,
    records: Sequence[ProblemRecord],
    names: Sequence[str],
    values: dict[tuple[int, str], float],
) -> None:
    width = 0.84 / max(1, len(names))
    for place, name in enumerate(names):
        points = [(i, values[i, name]) for i in range(len(records)) if (i, name) in values]
        offset = (place - (len(names) - 1) / 2) * width
        axes.bar(
            [i + offset for i, _ in points],
            [value for _, value in points],
            width * 0.94,
            color=_COLOURS.get(name, _OTHER),
            label=_label(records, name),
        )
    axes.set_xticks(range(len(records)))
    labels = [f"{record.problem.model}\n{_size(record)}" for record in records]
    axes.set_xticklabels(labels, fontsize=8)
    style(axes)


def _label(records: Sequence[ProblemRecord], name: str) -> str:
    entry = next(found for record in records if (found := record.entry(name)) is not None)
    return name if entry.with_loss else f"{name} (no loss)"


def _plain_ticks(axis: Axis) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _size(record: ProblemRecord) -> str:
    return f"{record.problem.queries}x{record.problem.head_dim}"


def save(figure: Figure, path: Path) -> None:
    write_whole(path, lambda beside: figure.savefig(beside, dpi=130))


def plot_bars(records: Sequence[ProblemRecord], title: str, path: Path) -> None:
    """One row a batch: speed over eager maps (log), and extra memory beside it (log)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = sorted({record.problem.batch for record in records})
    most = max(sum(r.problem.batch == batch for r in records) for batch in batches)
    figure = Figure(
        figsize=(min(max(11.0, 2.6 * most), 19.0), 3.4 * len(batches) + 1.2), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\nforward and backward; longer bars on the left are faster")
    grid = figure.subplots(len(batches), 2, squeeze=False, width_ratios=(3, 2))
    names = _names(records)
    for (left, right), batch in zip(grid, batches, strict=True):
        chosen = [record for record in records if record.problem.batch == batch]
        speed: dict[tuple[int, str], float] = {}
        extra: dict[tuple[int, str], float] = {}
        for i, record in enumerate(chosen):
            eager = record.entry("eager-maps")
            base = eager.seconds("both") if eager else None
            for entry in record.entries:
                seconds = entry.seconds("both")
                if seconds and base:
                    speed[i, entry.contender] = base / seconds
                if entry.sound and entry.memory is not None:
                    extra[i, entry.contender] = max(entry.memory.extra / 2**20, _LEAST_MIB)
        _grouped(left, chosen, names, speed)
        left.axhline(1.0, color="#555555", linewidth=0.8, linestyle="--")
        left.set_ylabel(f"batch {batch}\nspeed over eager maps")
        _grouped(right, chosen, names, extra)
        right.set_yscale("log")
        _plain_ticks(right.yaxis)
        right.set_ylabel(f"MiB beyond the results, from {_LEAST_MIB} on")
    handles, labels = grid[-1][0].get_legend_handles_labels()
    columns = int(figure.get_figwidth() / _INCHES_A_LABEL)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
    save(figure, path)


def plot_roofline(records: Sequence[ProblemRecord], rates: Rates, title: str, path: Path) -> None:
    """Achieved FLOP/s of forward plus backward over bytes that must move, under the ceilings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labelled: set[str] = set()
    intensities: list[float] = []
    for record in records:
        for entry in record.entries:
            seconds = entry.seconds("both")
            if not seconds:
                continue
            work = record.work_of(entry, "both")
            intensity = work.flops / (work.row_bytes + work.key_bytes)
            intensities.append(intensity)
            fresh = entry.contender not in labelled
            labelled.add(entry.contender)
            axes.plot(
                intensity,
                work.flops / seconds * 1e-9,
                "o" if entry.with_loss else "^",
                color=_COLOURS.get(entry.contender, _OTHER),
                markersize=7,
                alpha=0.85,
                markeredgecolor="white",
                label=_label(records, entry.contender) if fresh else None,
            )
    low, high = min(intensities) / 1.6, max(intensities) * 1.6
    points = [low * (high / low) ** (step / 100) for step in range(101)]
    roof = [min(rates.flops, rates.bytes * point) * 1e-9 for point in points]
    axes.plot(points, roof, color="#222222", linewidth=1.4, label="matrix and memory ceiling")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("floating-point operations of the products a byte that must move")
    axes.set_ylabel("GFLOP/s of the products")
    axes.set_title(
        f"{title}\nforward and backward; circles carry the loss, triangles do not", fontsize=11
    )
    style(axes)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save(figure, path)
