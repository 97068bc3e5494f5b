"""Plots of studies: ID, Prompt and ID(P) with intervals over identities."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from evals.studies.results import Results
from evals.studies.variants import CONTROLS, Study, Variant
from sefi_fast.evaluation.statistics import Interval, bootstrap

_SERIES = (
    ("id", "ID", "#2563a8", "o"),
    ("prompt", "Prompt", "#b3471d", "s"),
    ("id_p", "ID(P)", "#3f7d3a", "D"),
)


def plot_study(study: Study, results: Results) -> Image.Image | None:
    """The three scores of each variant with 95 % intervals; None where there is no score yet.

    Over the values of the variants where they have any, zero at the left edge of a logarithmic
    axis; variant beside variant otherwise. The class word's scores are dotted lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [variant for variant in study.variants if results.numbers(variant)]
    if not shown:
        return None
    has_axis = bool(study.axis)
    width = 6.4 if has_axis else max(6.4, 1.5 * len(shown))
    figure = Figure(figsize=(width, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if has_axis:
        _over_values(axes, study, shown, results)
    else:
        _beside(axes, shown, results)
    control = Variant(CONTROLS[0], None)
    for score, _, colour, _ in _SERIES:
        values = results.values(control, score)
        if values:
            axes.axhline(bootstrap(values).mean, color=colour, linestyle=":", linewidth=1)
    axes.set(title=f"{study.title} (dotted: the class word)", ylabel="score", ylim=(0, 1.02))
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    axes.legend(by_label.values(), by_label.keys(), frameon=False, fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    stream.seek(0)
    return Image.open(stream).convert("RGB")


def _over_values(axes: Any, study: Study, shown: Sequence[Variant], results: Results) -> None:
    values = sorted({v.value for v in shown if v.value is not None})
    positive = [value for value in values if value > 0]
    # A logarithmic axis has no zero: it stands a decade left of the smallest other value.
    zero = min(positive) / 10 if study.log and positive else 0.0
    for tied in (False, True):
        line = [v for v in shown if (v.config is not None and not v.config.split) == tied]
        line = sorted((v for v in line if v.value is not None), key=lambda v: v.value or 0.0)
        if not line:
            continue
        places = [zero if not v.value else v.value for v in line]
        for score, label, colour, marker in _SERIES:
            found = [bootstrap(results.values(v, score)) for v in line]
            axes.errorbar(
                places, [f.mean for f in found], yerr=_bars(found), color=colour, marker=marker,
                linestyle="--" if tied else "-", fillstyle="none" if tied else "full",
                capsize=3, linewidth=1.4, label=f"{label}, tied" if tied else label,
            )  # fmt: skip
    if study.log and positive:
        axes.set_xscale("log")
    ticks = [zero if value == 0 else value for value in values]
    axes.set_xticks(ticks, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(study.axis)


def _beside(axes: Any, shown: Sequence[Variant], results: Results) -> None:
    places = np.arange(len(shown))
    for shift, (score, label, colour, marker) in zip((-0.18, 0.0, 0.18), _SERIES, strict=True):
        found = [bootstrap(results.values(v, score)) for v in shown]
        axes.errorbar(
            places + shift, [f.mean for f in found], yerr=_bars(found), color=colour,
            marker=marker, linestyle="none", capsize=3, label=label,
        )  # fmt: skip
    names = [variant.name.replace(", ", ",\n") for variant in shown]
    axes.set_xticks(places, names, fontsize=8)
    axes.set_xlim(-0.6, len(shown) - 0.4)


def _bars(found: Sequence[Interval]) -> np.ndarray:
    """Distances [2, n] from the mean to both ends; none where there are too few identities."""
    bars = np.array([[f.mean - f.low for f in found], [f.high - f.mean for f in found]])
    return np.nan_to_num(bars).clip(0)
