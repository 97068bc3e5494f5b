"""Plots of the benchmarks from rows of their CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from common.attn_run import both_rows, by_problem
from common.providers import EAGER
from common.report import Row, write_whole
from common.roofline import Rates

# Backends of sefi_fast have warm colors, the others cool ones and grays.
_COLORS = {
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
# A logarithmic axis cannot show a call that allocates nothing.
_LEAST_MIB = 0.1


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _save(figure: Figure, path: Path, dpi: int = 130) -> None:
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=dpi))


def _style(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _label(row: Row) -> str:
    return row["provider"] if row["with_loss"] else f"{row['provider']} (no loss)"


def _plain_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _grouped(
    axes: Axes, problems: Sequence[dict[str, Row]], labels: dict[str, str], values: list[Row]
) -> None:
    """Draw a group of bars a problem, one bar a provider."""
    width = 0.84 / max(1, len(labels))
    for place, (name, label) in enumerate(labels.items()):
        points = [(i, row[name]) for i, row in enumerate(values) if name in row]
        offset = (place - (len(labels) - 1) / 2) * width
        axes.bar(
            [i + offset for i, _ in points],
            [value for _, value in points],
            width * 0.94,
            color=_COLORS.get(name, _OTHER),
            label=label,
        )
    ticks = []
    for problem in problems:
        row = next(iter(problem.values()))
        ticks.append(f"{row['model']}\n{row['queries']}x{row['head_dim']}")
    axes.set_xticks(range(len(problems)), ticks, fontsize=8)
    _style(axes)


def plot_bars(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a row a batch: speed over eager maps, and extra memory next to it."""
    problems = [both for group in by_problem(rows) if (both := both_rows(group))]
    found = {name: _label(row) for problem in problems for name, row in problem.items()}
    order = list(_COLORS)
    labels = dict(
        sorted(found.items(), key=lambda x: order.index(x[0]) if x[0] in order else len(order))
    )
    by_batch: dict[int, list[dict[str, Row]]] = {}
    for problem in problems:
        by_batch.setdefault(next(iter(problem.values()))["batch"], []).append(problem)
    width = min(max(11.0, 2.6 * max(map(len, by_batch.values()))), 19.0)
    title += "\nforward and backward; longer bars on the left are faster"
    figure = _figure(width, 3.4 * len(by_batch) + 1.2, title)
    grid = figure.subplots(len(by_batch), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), batch in zip(grid, sorted(by_batch), strict=True):
        chosen = by_batch[batch]
        speeds: list[Row] = []
        extra: list[Row] = []
        for both in chosen:
            base = both[EAGER.name]["seconds"] if EAGER.name in both else None
            speeds.append({n: base / row["seconds"] for n, row in both.items()} if base else {})
            extra.append(
                {n: max(row["extra_bytes"] / 2**20, _LEAST_MIB) for n, row in both.items()}
            )
        _grouped(left, chosen, labels, speeds)
        left.axhline(1.0, color="#555555", linewidth=0.8, linestyle="--")
        left.set_ylabel(f"batch {batch}\nspeed over eager maps")
        _grouped(right, chosen, labels, extra)
        right.set_yscale("log")
        _plain_ticks(right.yaxis)
        right.set_ylabel(f"MiB beyond the results, from {_LEAST_MIB} on")
    handles, names = grid[-1][0].get_legend_handles_labels()
    columns = int(width / _INCHES_A_LABEL)
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns, len(names)))
    _save(figure, path)


def plot_roofline(rows: Sequence[Row], rates: Rates, title: str, path: Path) -> None:
    """Draw achieved FLOP/s of forward plus backward over intensity, under the ceilings."""
    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    intensities: list[float] = []
    for row in (row for group in by_problem(rows) for row in both_rows(group).values()):
        name, intensity = row["provider"], row["gflops"] / row["gigabytes_per_second"]
        intensities.append(intensity)
        axes.plot(
            intensity,
            row["gflops"],
            "o" if row["with_loss"] else "^",
            color=_COLORS.get(name, _OTHER),
            markersize=7,
            alpha=0.85,
            markeredgecolor="white",
            label=None if name in labelled else _label(row),
        )
        labelled.add(name)
    low, high = min(intensities) / 1.6, max(intensities) * 1.6
    points = [low * (high / low) ** (step / 100) for step in range(101)]
    roof = [min(rates.flops, rates.bytes * point) * 1e-9 for point in points]
    axes.plot(points, roof, color="#222222", linewidth=1.4, label="matrix and memory ceiling")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("floating-point operations of the products per byte that must move")
    axes.set_ylabel("GFLOP/s of the products")
    axes.set_title(
        f"{title}\nforward and backward; circles are with the loss, triangles without", fontsize=11
    )
    _style(axes)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _save(figure, path)


def plot_speed(rows: Sequence[Row], device: str, path: Path, batch: int = 16) -> None:
    """Draw time and extra memory of sefi_fast, SDPA and eager maps on the layers of SD 1.5."""
    layers = []
    for group in by_problem(rows):
        both = both_rows(group)
        fused = [row for name, row in both.items() if name in ("sefi-cuda", "sefi-triton")]
        if fused and (group[0]["model"], group[0]["batch"]) == ("sd15", batch):
            # SDPA without a chosen backend: PyTorch takes the one that it prefers.
            ours = min(fused, key=lambda row: row["seconds"])
            layers.append((ours, both["sdpa"], both[EAGER.name]))
    if not layers:
        raise ValueError(f"no layer of sd15 at batch {batch} with sefi_fast's kernels in the rows")
    names = ("sefi_fast, with the loss", "SDPA, without the loss", "eager PyTorch, with the loss")
    colors = (_COLORS["sefi-triton"], _COLORS["sdpa"], _COLORS["eager-maps"])
    dtype = layers[0][0]["dtype"]
    title = f"Cross-attention of Stable Diffusion 1.5, forward + backward ({device}, {dtype})"
    figure = _figure(10.0, 4.4, title)
    panels = (
        ("time (µs)", "seconds", 1e6),
        ("memory beyond the results (MiB)", "extra_bytes", 2**-20),
    )
    for axes, (what, column, factor) in zip(
        figure.subplots(1, 2, sharey=True), panels, strict=True
    ):
        for place, (name, color) in enumerate(zip(names, colors, strict=True)):
            values = [rows_[place][column] * factor for rows_ in layers]
            at = [i + (place - 1) * 0.27 for i in range(len(layers))]
            bars = axes.barh(at, values, 0.25, color=color, label=name)
            texts = [f"{value:,.0f}" if value >= 0.5 else "<1" for value in values]
            axes.bar_label(bars, texts, padding=3, fontsize=10)
        axes.set_xlabel(what, fontsize=11)
        axes.margins(x=0.12)
        ticks = [f"{ours['queries']} queries\nhead_dim {ours['head_dim']}" for ours, *_ in layers]
        axes.set_yticks(range(len(layers)), ticks, fontsize=10)
        _style(axes, "x")
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    keys = layers[0][0]["keys"]
    legend_title = f"batch {batch}, 8 heads, {keys} text tokens; shorter bars are better"
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=11, title=legend_title,
        frameon=False,
    )  # fmt: skip
    _save(figure, path, dpi=160)


_PART_COLORS = {
    "noise": "#8d99ae",
    "image": "#6a4c93",
    "text": "#00798c",
    "U-Net forward": "#edae49",
    "loss": "#3d5a3c",
    "backward": "#d1495b",
    "optimizer": "#30a3b5",
}


def plot_steps(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw each provider's training step by part (a dot for the median), and its memory."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if "seconds" in row:
            groups.setdefault((row["model"], row["batch"], row["dtype"]), []).append(row)
    figure = _figure(12.0, 2.6 * len(groups) + 1.1, title)
    grid = figure.subplots(len(groups), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), shown in zip(grid, groups.values(), strict=True):
        places = range(len(shown))
        begun = [0.0] * len(shown)
        for part, color in _PART_COLORS.items():
            lengths = [row[f"seconds_{part}"] * 1e3 for row in shown]
            left.barh(places, lengths, 0.62, begun, color=color, label=part)
            begun = [a + b for a, b in zip(begun, lengths, strict=True)]
        medians = [row["seconds"] * 1e3 for row in shown]
        left.plot(medians, places, "D", color="#222222", markersize=5, label="whole step")
        for column, color, label in (
            ("peak_bytes", "#c5e3e8", "peak of a step"),
            ("held_bytes", "#00798c", "held between steps"),
        ):
            mebibytes = [row[column] / 2**20 for row in shown]
            right.barh(places, mebibytes, 0.62, color=color, label=label)
        names = [row["provider"] for row in shown]
        for axes, labels in ((left, names), (right, [""] * len(names))):
            axes.set_yticks(places, labels)
            axes.invert_yaxis()
            _style(axes, "x")
        first = shown[0]
        left.set_title(
            f"{first['model']}, widths {first['widths']}, latent {first['latent']}, "
            f"batch {first['batch']}, {first['dtype']}",
            fontsize=10,
        )
        left.set_xlabel("ms")
        right.set_xlabel("MiB")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    grid[0][1].legend(fontsize=9, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    _save(figure, path)


def plot_subjects(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw subjects an hour and the share of the matrix rate over the subjects of a batch."""
    figure = _figure(9.0, 3.6, title)
    counts = [row["batch_subjects"] for row in rows]
    panels = (
        ("subjects per hour", "#d1495b", [row["subjects_an_hour"] for row in rows]),
        ("% of the rate of a large product", "#00798c", [100 * row["flops_share"] for row in rows]),
    )
    for axes, (label, color, values) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.plot(counts, values, "o-", color=color)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, list(map(str, counts)))
        axes.set_xlabel("subjects trained together")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.1 * max(values))
        _style(axes)
    _save(figure, path)
