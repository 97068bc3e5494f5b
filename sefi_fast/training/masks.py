"""Where the image shows the subject: a mask from a file or an array, cut as the image is."""

from __future__ import annotations

import logging
import os

import numpy as np
from PIL import Image
from torch import Tensor

from sefi_fast.errors import ImageError
from sefi_fast.training.image import load_image, prepare

logger = logging.getLogger(__name__)


def load_mask(
    source: str | os.PathLike[str] | Image.Image | np.ndarray,
    picture: Image.Image,
    size: int,
    crop: str = "center",
) -> Tensor:
    """Return the mask of a prepared image, float32 [size, size] in [0, 1], 1 on the subject.

    A mask that is white in the whole square is taken with a warning: the subject may fill it.

    Args:
        source: an image file or PIL image, white on the subject, and black or transparent
            elsewhere, or an array [h, w] of bool, integers in [0, 255] or floats in [0, 1].
        picture: the image that the mask belongs to, upright, as `load_image` gives it.
        size: side length in pixels of the square that is trained on.
        crop: which square of the image that is.

    Raises:
        ImageError: the mask cannot be read, has another size than the image, or shows nothing
            of the subject in the square that is trained on.
        TypeError: `source` is none of these.
    """
    mask = open_mask(source)
    if mask.size != picture.size:
        raise ImageError(
            f"the mask is {mask.width}×{mask.height} pixels and its picture {picture.width}×"
            f"{picture.height}: draw the mask on the picture itself"
        )
    # Bicubic resizing overshoots at edges.
    square = ((prepare(mask, size, crop).mean(0) + 1) / 2).clamp(0, 1)
    check_selection(
        square.min().item(),
        square.max().item(),
        f"the part that is trained on (the {crop} square is kept)",
    )
    return square


def open_mask(source: str | os.PathLike[str] | Image.Image | np.ndarray) -> Image.Image:
    """Return a mask as an RGB image; what is transparent is black.

    Raises:
        ImageError, TypeError: as for `load_image`.
    """
    try:
        return load_image(source, background="black")
    except ImageError as error:
        raise ImageError(f"the mask: {error}") from error


def check_selection(lowest: float, highest: float, where: str) -> None:
    """Refuse a mask without a white part, and warn of one without a black part.

    Args:
        lowest, highest: of the mask's values in [0, 1].
        where: the part of the image that they are from, for the message.

    Raises:
        ImageError: the mask selects nothing.
    """
    if highest <= 0.5:
        raise ImageError(
            f"the mask is empty in {where}. It must be white on what is meant, and black or "
            "transparent elsewhere. Draw it again"
        )
    if lowest > 0.5:
        logger.warning(
            "the mask is white everywhere in %s: it selects all of it, as no mask does", where
        )
