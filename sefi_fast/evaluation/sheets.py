"""Images to look at: contact sheets, training curves and validation sheets."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sefi_fast.pipelines import swap

if TYPE_CHECKING:
    from sefi_fast.training import History


_INK = (30, 30, 34)
_MUTED = (110, 110, 118)
_PAPER = (255, 255, 255)
_MARGIN = 12


class Panel(NamedTuple):
    """One image of a contact sheet and the words under it."""

    image: Image.Image
    caption: str = ""


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Panel]]], *, title: str = "", panel_size: int = 144
) -> Image.Image:
    """Draw rows of captioned images, each row under a heading of its own.

    Args:
        rows: (heading, panels) from top to bottom; a heading may be empty.
        title: a line above everything.
        panel_size: side in pixels into which each image is fitted, its proportions kept.
            Images smaller than this are enlarged without smoothing.

    Returns:
        An RGB image as wide as the longest row.

    Raises:
        ValueError: there is no image at all.
    """
    if not any(panels for _, panels in rows):
        raise ValueError("contact_sheet got no images: give at least one row with one panel")
    text_font, heading_font, title_font = (ImageFont.load_default(size) for size in (11, 14, 18))
    columns = max(len(panels) for _, panels in rows)
    wrap = max(8, panel_size // 6)
    captions = [[textwrap.wrap(p.caption, wrap) for p in panels] for _, panels in rows]
    caption_heights = [13 * max((len(c) for c in row), default=0) + 8 for row in captions]
    heading_heights = [24 if heading else 4 for heading, _ in rows]
    width = max(
        columns * (panel_size + _MARGIN) + _MARGIN,
        int(title_font.getlength(title)) + 2 * _MARGIN,
        *(int(heading_font.getlength(heading)) + 2 * _MARGIN for heading, _ in rows),
    )
    top = 38 if title else _MARGIN // 2
    height = top + sum(
        h + panel_size + c for h, c in zip(heading_heights, caption_heights, strict=True)
    )
    sheet = Image.new("RGB", (width, height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, 10), title, _INK, font=title_font)
    y = top
    for (heading, panels), lines, above, below in zip(
        rows, captions, heading_heights, caption_heights, strict=True
    ):
        if heading:
            draw.text((_MARGIN, y + 3), heading, _INK, font=heading_font)
        y += above
        for column, (panel, caption) in enumerate(zip(panels, lines, strict=True)):
            x = _MARGIN + column * (panel_size + _MARGIN)
            fitted = _fit(panel.image, panel_size)
            offset = (panel_size - fitted.width) // 2, (panel_size - fitted.height) // 2
            sheet.paste(fitted, (x + offset[0], y + offset[1]))
            for number, line in enumerate(caption):
                draw.text((x, y + panel_size + 3 + 13 * number), line, _MUTED, font=text_font)
        y += panel_size + below
    return sheet


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def training_curves(history: History, *, title: str = "training") -> Image.Image:
    """Plot the noise loss and the subject loss of a run over its steps.

    Each is drawn step by step (pale) and as a running mean over a tenth of the run (dark), the
    subject loss in its own panel since its unit differs (docs/method.md, equation 5).

    Raises:
        ValueError: the history holds no step.
    """
    if not history.loss:
        raise ValueError("training_curves got an empty history: train for at least one step")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    seconds = f"{history.seconds[-1]:.0f} s" if history.seconds else ""
    figure.suptitle(f"{title}: {len(history.loss)} steps, {seconds}")
    panels = (
        ("noise loss", history.loss, "#2563a8"),
        ("subject_loss", history.subject_loss, "#b3471d"),
    )
    for axes, (name, values, colour) in zip(figure.subplots(1, 2), panels, strict=True):
        series = np.asarray(values, dtype=np.float64)
        steps = np.arange(1, len(series) + 1)
        axes.plot(steps, series, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(series), color=colour, linewidth=1.8)
        axes.set(xlabel="step", title=name)
        axes.set_ylim(0, float(np.nanpercentile(series, 99)) * 1.15 or 1.0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def validation_sheet(history: History, prompts: Sequence[str]) -> Image.Image:
    """The images that were drawn while a subject trained, a row each time.

    Args:
        history: of the subject.
        prompts: captions of each row's images, in the order of `validation_prompts`.

    Raises:
        ValueError: no image was drawn.
    """
    # Of a run that was resumed with other prompts there may be more images than captions.
    return contact_sheet(
        [(f"step {step}", list(map(Panel, drawn, prompts))) for step, drawn in history.validation]
    )


def _running_mean(series: np.ndarray) -> np.ndarray:
    window = max(1, len(series) // 10)
    totals = np.cumsum(np.insert(series, 0, 0.0))
    ends = np.arange(1, len(series) + 1)
    starts = np.maximum(0, ends - window)
    return (totals[ends] - totals[starts]) / (ends - starts)


def _fit(image: Image.Image, size: int) -> Image.Image:
    image = image.convert("RGB")
    scale = size / max(image.size)
    target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.resize(target, resample)


def swap_sheet(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    panel_size: int = 144,
    **sampling: Any,
) -> Image.Image:
    """Draw a square of images: row i has the keys of prompt i, column j the values of prompt j.

    All start from the same noise. On the diagonal stand the images of the prompts themselves.
    Along a row the attention stays and the content changes, along a column the other way round.

    Args:
        pipe: a pipeline, with subjects attached or without.
        prompts: two or more sentences, best ones that differ in single words.
        seed: of the noise.
        panel_size: side of an image in pixels.
        sampling: `steps`, `guidance` and what else `sefi_fast.swap` takes.

    Raises:
        ValueError: there are fewer than two prompts.
        ModelError, PromptError: as for `sefi_fast.swap`.
    """
    if isinstance(prompts, str) or len(prompts) < 2:
        raise ValueError(f"swap_sheet wants at least two prompts, got {prompts!r}")
    rows = []
    for keys in prompts:
        panels = []
        for values in prompts:
            (image,) = swap(pipe, key_prompt=keys, value_prompt=values, seed=seed, **sampling)
            panels.append(
                Panel(image, "values: the same" if values == keys else f"values: {values}")
            )
        rows.append((f"keys: {keys}", panels))
    return contact_sheet(
        rows, title="keys from one prompt, values from another", panel_size=panel_size
    )
