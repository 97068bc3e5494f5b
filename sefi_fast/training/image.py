"""Read a picture in whatever form it comes and make the square tensor that the VAE wants."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sefi_fast.errors import ImageError
from sefi_fast.utils.files import user_path

SMALLEST_SIDE = 16

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where the kept square lies on the longer axis, if that is (the width, the height).
_ANCHORS = {
    "center": (0.5, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
}
TIME_IDS = ("original height", "original width", "top", "left", "height", "width")
"""What the numbers of `time_ids` are."""

# What Pillow's decoders raise on damaged files, beside their own classes, which are OSErrors.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


def load_image(source: str | os.PathLike[str] | Image.Image | np.ndarray) -> Image.Image:
    """An upright RGB picture of 8 bits a channel.

    EXIF orientation is applied, transparency is laid over white, of an animation the first frame
    is taken, and 16 bit values are scaled to 8.

    Args:
        source: a file that Pillow reads, a PIL image, or an array [h, w], [h, w, 1], [h, w, 3] or
            [h, w, 4] of uint8, uint16, bool, integers in [0, 255] or floats in [0, 1].

    Raises:
        ImageError: the file is missing, unreadable or cut off, the picture is smaller than 16
            pixels on a side, or its values cannot be understood.
        TypeError: `source` is none of these.
    """
    if isinstance(source, np.ndarray):
        image, name = _from_array(source), f"the array of shape {source.shape}"
    elif isinstance(source, Image.Image):
        name = f"the {type(source).__name__}"
        image = _loaded(source, name)
    elif isinstance(source, (str, os.PathLike)):
        path = user_path(source)
        image, name = _open(path), str(path)
    else:
        raise TypeError(
            "image must be a path, a PIL image or a numpy array [h, w, 3], got "
            f"{type(source).__name__}"
        )
    if min(image.size) < SMALLEST_SIDE:
        raise ImageError(
            f"{name} is {image.width}×{image.height} pixels: a picture of at least "
            f"{SMALLEST_SIDE}×{SMALLEST_SIDE} is needed"
        )
    return _to_rgb(image, name)


def prepare(image: Image.Image, size: int, crop: str = "center") -> Tensor:
    """The picture's square as float32 [3, size, size] in [-1, 1], resized with antialiasing.

    Args:
        image: an RGB picture.
        size: side length in pixels.
        crop: which square of a picture that is not square: "center", "top", "bottom", "left" or
            "right"; an anchor that does not lie on the longer axis means the centre.
    """
    left, top, side = _square(image, crop)
    box = (left, top, left + side, top + side)
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32))
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def time_ids(image: Image.Image, size: int, crop: str = "center") -> Tensor:
    """What SDXL is told of a prepared picture's size and crop, float32 [6].

    Height and width of the picture as it came; top and left of the kept square in pixels of the
    resized picture, as in SDXL's own training; height and width of the square. The mirrored picture
    has the same.

    Args:
        image, size, crop: as for `prepare`.
    """
    left, top, side = _square(image, crop)
    corner = (round(top * size / side), round(left * size / side))
    return torch.tensor([image.height, image.width, *corner, size, size], dtype=torch.float32)


def _square(image: Image.Image, crop: str) -> tuple[int, int, int]:
    """Left, top and side of the kept square, in pixels of the picture."""
    side = min(image.size)
    across, down = _ANCHORS[crop]
    return round((image.width - side) * across), round((image.height - side) * down), side


def _open(path: Path) -> Image.Image:
    if ":/" in str(path)[2:]:
        raise ImageError(f"{path} is an address: download the picture and give its path")
    if path.is_dir():
        raise ImageError(f"{path} is a folder: give the path of one picture")
    if not path.exists():
        raise ImageError(f"there is no picture at {path}")
    try:
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large a picture ({error}): make it smaller") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is not a picture that Pillow reads (its formats are PNG, JPEG, WebP, TIFF …), "
            "or it is cut off at its very beginning"
        ) from error
    except _DAMAGED as error:
        raise _damaged(str(path), error) from error
    with image:
        return _loaded(image, str(path))


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """An upright copy that needs its file no longer."""
    try:
        image.load()
    except _DAMAGED as error:
        raise _damaged(name, error) from error
    method = _UPRIGHT.get(_orientation(image))
    if method is None:
        return image.copy()
    turned = image.transpose(method)
    if "transparency" in image.info:
        turned.info["transparency"] = image.info["transparency"]
    return turned


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name} cannot be read ({error}): the picture is damaged or cut off")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (*_DAMAGED, TypeError, KeyError):
        # A picture with broken EXIF data is shown as it is stored, as viewers do.
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 257, name)
    if image.mode in ("I", "F"):
        return _grey(_to_byte_range(np.asarray(image).astype(np.float64), name), name)
    try:
        if image.has_transparency_data:
            layered = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, layered).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"{name} has the colour mode {image.mode}, which cannot be made RGB: save it as an RGB "
            "PNG or JPEG"
        ) from error


def _to_byte_range(values: np.ndarray, name: str) -> np.ndarray:
    """Values of a wide greyscale picture scaled to [0, 255] by the smallest range they fit."""
    highest = float(values.max())
    if not np.isfinite(values).all() or float(values.min()) < 0 or highest > 65535:
        raise ImageError(
            f"{name} has values from {values.min():g} to {values.max():g}: a picture of 8 or 16 "
            "bits a channel, or of floats in [0, 1], is needed"
        )
    if highest <= 1:
        return values * 255
    return values if highest <= 255 else values / 257


def _grey(values: np.ndarray, name: str) -> Image.Image:
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8), "L").convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    name = f"the array of shape {array.shape} and type {array.dtype}"
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0:
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "; channels come last: transpose it with (1, 2, 0)"
        raise ImageError(f"{name} is no picture: [h, w], [h, w, 3] or [h, w, 4] is wanted{hint}")
    bytes_ = _array_to_bytes(array, name)
    if bytes_.shape[-1] == 1:
        return Image.fromarray(bytes_[..., 0])
    return Image.fromarray(bytes_)


def _array_to_bytes(array: np.ndarray, name: str) -> Any:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return np.rint(array / 257).astype(np.uint8)
    lowest, highest = (0, 1) if np.issubdtype(array.dtype, np.floating) else (0, 255)
    is_number = np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
    if not is_number or not np.isfinite(array).all():
        raise ImageError(f"{name} holds values that are no finite numbers")
    if array.min() < lowest or array.max() > highest:
        raise ImageError(
            f"{name} has values from {array.min():g} to {array.max():g}: floats in [0, 1] or "
            "integers in [0, 255] are wanted"
        )
    return np.rint(array * (255 / highest)).astype(np.uint8)
