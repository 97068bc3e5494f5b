"""Contact sheets of images, training curves and validation sheets."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sefi_fast.pipelines import swap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sefi_fast.training import History


_INK = (30, 30, 34)
_MUTED = (110, 110, 118)
_PAPER = (255, 255, 255)
_MARGIN = 12


class Panel(NamedTuple):
    """One image of a contact sheet and the caption under it."""

    image: Image.Image
    caption: str = ""


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Panel]]], *, title: str = "", panel_size: int = 144
) -> Image.Image:
    """Draw rows of captioned images, each row under a heading.

    Args:
        rows: (heading, panels) from top to bottom; a heading may be empty.
        title: text at the top.
        panel_size: side in pixels into which each image is fitted with its proportions.
            Images smaller than half of it are enlarged without smoothing.

    Returns:
        An RGB image as wide as the longest row.

    Raises:
        ValueError: there is no image.
    """
    if not any(panels for _, panels in rows):
        raise ValueError("contact_sheet got no images. Give at least one row with one panel.")
    fonts: list[Any] = [ImageFont.load_default(size) for size in (11, 14, 18)]
    text_font, heading_font, title_font = fonts
    wrap = max(8, panel_size // 6)
    captions = [[textwrap.wrap(panel.caption, wrap) for panel in panels] for _, panels in rows]
    above = [24 if heading else 4 for heading, _ in rows]
    below = [13 * max((len(lines) for lines in row), default=0) + 8 for row in captions]
    width = max(
        max(len(panels) for _, panels in rows) * (panel_size + _MARGIN) + _MARGIN,
        int(title_font.getlength(title)) + 2 * _MARGIN,
        *(int(heading_font.getlength(heading)) + 2 * _MARGIN for heading, _ in rows),
    )
    y = 38 if title else _MARGIN // 2
    height = y + sum(above) + len(rows) * panel_size + sum(below) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 10), title, _INK, font=title_font)
    for row, (heading, panels) in enumerate(rows):
        pen.text((_MARGIN, y + 3), heading, _INK, font=heading_font)
        y += above[row]
        for column, (panel, lines) in enumerate(zip(panels, captions[row], strict=True)):
            x = _MARGIN + column * (panel_size + _MARGIN)
            fitted = _fit(panel.image, panel_size)
            offset = (panel_size - fitted.width) // 2, (panel_size - fitted.height) // 2
            sheet.paste(fitted, (x + offset[0], y + offset[1]))
            for number, line in enumerate(lines):
                pen.text((x, y + panel_size + 3 + 13 * number), line, _MUTED, font=text_font)
        y += panel_size + below[row]
    return sheet


def _fit(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(target, resample)


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def figure_image(figure: Figure) -> Image.Image:
    """Return a figure of matplotlib as an RGB image."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")


def training_curves(history: History, *, title: str = "training") -> Image.Image:
    """Plot the noise loss and the subject loss (docs/method.md, equation 5) of a run.

    Each has its own panel: pale step by step, dark as a running mean over a tenth of the run.

    Raises:
        ValueError: the history holds no step.
    """
    if not history.loss:
        raise ValueError("training_curves got an empty history. Train for at least one step.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    seconds = f"{history.seconds[-1]:.0f} s" if history.seconds else ""
    figure.suptitle(f"{title}: {len(history.loss)} steps, {seconds}")
    panels = (
        ("noise loss", history.loss, "#2563a8"),
        ("subject_loss", history.subject_loss, "#b3471d"),
    )
    for axes, (name, values, color) in zip(figure.subplots(1, 2), panels, strict=True):
        series = np.asarray(values, dtype=np.float64)
        ends = np.arange(1, len(series) + 1)
        starts = np.maximum(0, ends - max(1, len(series) // 10))
        totals = np.cumsum(np.insert(series, 0, 0.0))
        axes.plot(ends, series, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(
            ends, (totals[ends] - totals[starts]) / (ends - starts), color=color, linewidth=1.8
        )
        axes.set(xlabel="step", title=name)
        axes.set_ylim(0, float(np.nanpercentile(series, 99)) * 1.15 or 1.0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure_image(figure)


def validation_sheet(history: History, prompts: Sequence[str]) -> Image.Image:
    """Show the validation images of a run, one row for each time.

    Args:
        history: history of a subject.
        prompts: captions of each row's images, in the order of `validation_prompts`.

    Raises:
        ValueError: there are no validation images.
    """
    # A run that was resumed with other prompts may have more images than captions.
    return contact_sheet(
        [(f"step {step}", list(map(Panel, images, prompts))) for step, images in history.validation]
    )


def swap_sheet(
    pipe: Any, prompts: Sequence[str], *, seed: int = 0, panel_size: int = 144, **sampling: Any
) -> Image.Image:
    """Show a square of images: row i has the keys of prompt i, column j the values of prompt j.

    All start from the same noise. The diagonal holds the images of the prompts themselves. Along a
    row the attention stays and the content changes, along a column the other way round.

    Args:
        pipe: a pipeline, with subjects attached or without.
        prompts: two or more sentences, best ones that differ in single words.
        seed: seed of the noise.
        panel_size: side of an image in pixels.
        sampling: `steps`, `guidance` and other arguments of `sefi_fast.swap`.

    Raises:
        ValueError: there are fewer than two prompts.
        ModelError, PromptError: as for `sefi_fast.swap`.
    """
    if isinstance(prompts, str) or len(prompts) < 2:
        raise ValueError(f"swap_sheet got {prompts!r}. Give at least two prompts.")
    rows = []
    for keys in prompts:
        panels = []
        for values in prompts:
            (image,) = swap(pipe, key_prompt=keys, value_prompt=values, seed=seed, **sampling)
            caption = "values: the same" if values == keys else f"values: {values}"
            panels.append(Panel(image, caption))
        rows.append((f"keys: {keys}", panels))
    title = "keys from one prompt, values from another"
    return contact_sheet(rows, title=title, panel_size=panel_size)
