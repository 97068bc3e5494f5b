"""Plots of studies: ID, Prompt and ID(P) with intervals over identities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from evals.studies.results import Results
from evals.studies.variants import CONTROLS, Study, Variant
from sefi_fast.evaluation.sheets import figure_image
from sefi_fast.evaluation.statistics import bootstrap

_SERIES = (
    ("id", "ID", "#2563a8", "o"),
    ("prompt", "Prompt", "#b3471d", "s"),
    ("id_p", "ID(P)", "#3f7d3a", "D"),
)


def plot_study(study: Study, results: Results) -> Image.Image | None:
    """Plot the three scores of each variant with 95 % intervals; None if there is no score.

    Variants with values have an axis, on which a logarithmic one has zero at its left edge. The
    others are next to one another. Dotted lines are the class word's scores.
    """
    shown = [variant for variant in study.variants if results.numbers(variant)]
    if not shown:
        return None
    width = 6.4 if study.axis else max(6.4, 1.5 * len(shown))
    figure = Figure(figsize=(width, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    if study.axis:
        _plot_over_values(axes, study, shown, results)
    else:
        _plot_in_row(axes, shown, results)
    control = Variant(CONTROLS[0], None)
    for score, _, color, _ in _SERIES:
        values = results.values(control, score)
        if values:
            axes.axhline(bootstrap(values).mean, color=color, linestyle=":", linewidth=1)
    axes.set(title=f"{study.title} (dotted: the class word)", ylabel="score", ylim=(0, 1.02))
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    axes.legend(by_label.values(), by_label.keys(), frameon=False, fontsize=8)
    return figure_image(figure)


def _plot_over_values(axes: Axes, study: Study, shown: Sequence[Variant], results: Results) -> None:
    values = sorted({v.value for v in shown if v.value is not None})
    # A logarithmic axis has no zero, so zero is a decade left of the smallest other value.
    zero = min((value for value in values if value > 0), default=1.0) / 10 if study.log else 0.0
    for tied in (False, True):
        line = [v for v in shown if v.config is not None and v.config.split != tied]
        line = sorted((v for v in line if v.value is not None), key=lambda v: v.value or 0.0)
        places = np.array([v.value or zero for v in line])
        for score, label, color, marker in _SERIES if line else ():
            _plot_intervals(
                axes, places, line, results, score, color=color, marker=marker,
                linestyle="--" if tied else "-", fillstyle="none" if tied else "full",
                linewidth=1.4, label=f"{label}, tied" if tied else label,
            )  # fmt: skip
    if study.log:
        axes.set_xscale("log")
    axes.set_xticks([value or zero for value in values], [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(study.axis)


def _plot_in_row(axes: Axes, shown: Sequence[Variant], results: Results) -> None:
    places = np.arange(len(shown))
    for shift, (score, label, color, marker) in zip((-0.18, 0.0, 0.18), _SERIES, strict=True):
        _plot_intervals(
            axes, places + shift, shown, results, score, color=color, marker=marker,
            linestyle="none", label=label,
        )  # fmt: skip
    names = [variant.name.replace(", ", ",\n") for variant in shown]
    axes.set_xticks(places, names, fontsize=8)
    axes.set_xlim(-0.6, len(shown) - 0.4)


def _plot_intervals(
    axes: Axes,
    places: np.ndarray,
    variants: Sequence[Variant],
    results: Results,
    score: str,
    **style: Any,
) -> None:
    found = [bootstrap(results.values(variant, score)) for variant in variants]
    bars = np.array([[f.mean - f.low for f in found], [f.high - f.mean for f in found]])
    # Too few identities have no interval.
    bars = np.nan_to_num(bars).clip(0)
    axes.errorbar(places, [f.mean for f in found], yerr=bars, capsize=3, **style)
