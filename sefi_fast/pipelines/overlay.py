"""Draw attention maps over pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_INK = (30, 30, 34)
_PAPER = (255, 255, 255)
_GAP = 8
_STRENGTH = 0.65
_LEAST_WIDTH = 144


def draw_overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """The picture, in its own size, with a heat map [h, w] over it.

    Colours run from nothing to the strongest place of this map.
    """
    from matplotlib import colormaps

    picture = image.convert("RGB")
    values = attention.detach().float().cpu().numpy()
    heat = Image.fromarray(values / max(float(values.max()), 1e-12))
    heat = heat.resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(heat), 0.0, 1.0)
    colours = colormaps["inferno"](strength)[..., :3]
    # Where nothing is attended the picture shows through, darkened, so that hot places stand out.
    opacity = (_STRENGTH * (0.4 + 0.6 * strength))[..., None]
    blended = np.asarray(picture) / 255.0 * (1 - opacity) + colours * opacity
    return Image.fromarray(np.uint8(np.round(blended * 255)))


def draw_grid(
    rows: Sequence[tuple[Image.Image, Sequence[tuple[str, Tensor]]]],
) -> Image.Image:
    """One row a picture: itself, then each (word, map [h, w]) over it, with captions.

    Raises:
        ValueError: there is no picture.
    """
    if not rows:
        raise ValueError("grid got no pictures: give the images of the traced call")
    cells = []
    for image, maps in rows:
        picture = _enlarged(image.convert("RGB"))
        overlays = [_captioned(draw_overlay(picture, m), word) for word, m in maps]
        cells.append([_captioned(picture, "picture"), *overlays])
    cell_width = max(cell.width for row in cells for cell in row)
    heights = [max(cell.height for cell in row) for row in cells]
    width = max(len(row) for row in cells) * (cell_width + _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) + 1)), _PAPER)
    top = _GAP
    for row, height in zip(cells, heights, strict=True):
        for column, cell in enumerate(row):
            left = _GAP + column * (cell_width + _GAP) + (cell_width - cell.width) // 2
            sheet.paste(cell, (left, top))
        top += height + _GAP
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    """The picture in whole multiples of its size, large enough to read a caption under it."""
    factor = -(-_LEAST_WIDTH // picture.width)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    size = max(11, min(20, picture.width // 12))
    font = ImageFont.load_default(size)
    bar = size + 8
    width = max(picture.width, int(font.getlength(caption)) + 8)
    framed = Image.new("RGB", (width, picture.height + bar), _PAPER)
    framed.paste(picture, ((width - picture.width) // 2, 0))
    ImageDraw.Draw(framed).text(
        (width // 2, picture.height + bar // 2), caption, _INK, font=font, anchor="mm"
    )
    return framed
