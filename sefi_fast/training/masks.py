"""Where the picture shows the subject: a mask from a file or an array, cut as the picture is."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sefi_fast.errors import ImageError
from sefi_fast.training.image import load_image, prepare


def load_mask(
    source: str | os.PathLike[str] | Image.Image | np.ndarray,
    picture: Image.Image,
    size: int,
    crop: str = "center",
) -> Tensor:
    """The mask of a prepared picture, float32 [size, size] in [0, 1], 1 on the subject.

    Args:
        source: a picture file or PIL image, white on the subject and black elsewhere, or an array
            [h, w] of bool, integers in [0, 255] or floats in [0, 1].
        picture: what the mask belongs to, upright, as `load_image` gives it.
        size: side length in pixels of the square that is trained on.
        crop: which square of the picture that is.

    Raises:
        ImageError: the mask cannot be read, has another size than the picture, or shows nothing
            of the subject in the square that is trained on.
        TypeError: `source` is none of these.
    """
    try:
        mask = load_image(source)
    except ImageError as error:
        raise ImageError(f"the mask: {error}") from error
    if mask.size != picture.size:
        raise ImageError(
            f"the mask is {mask.width}×{mask.height} pixels and its picture {picture.width}×"
            f"{picture.height}: draw the mask on the picture itself"
        )
    # Bicubic resizing overshoots at edges.
    square = ((prepare(mask, size, crop).mean(0) + 1) / 2).clamp(0, 1)
    if not bool(torch.any(square > 0.5)):
        raise ImageError(
            "the mask is empty in the part of the picture that is trained on: it must be white "
            f"where the subject is, and the {crop} square is kept"
        )
    return square
