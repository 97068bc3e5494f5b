"""Read an image of any kind and make the square tensor that the VAE takes."""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from sefi_fast.errors import ImageError, PathError, printable
from sefi_fast.utils.files import open_regular, user_path

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 16

_BITS_TAG = 258
_PHOTOMETRIC_TAG = 262
_ORIENTATION_TAG = 274
# Position of the kept square if the longer axis is (the width, the height).
_ANCHORS = {
    "center": (0.5, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
}
TIME_IDS = ("original height", "original width", "top", "left", "height", "width")
"""The numbers of `time_ids`."""

LARGEST_FILE = 2**29
"""Bytes of an image file."""

# No decoder of these starts another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "AVIF")
_WANTED = "a PNG, JPEG, WebP, TIFF, BMP, GIF, JPEG 2000, PPM or AVIF image is needed"
_MOST_MEMORY = 10**9
# Bytes of memory per pixel that decoding and conversion take at their peak, measured.
_MEMORY = {"TIFF": 13, "progressive": 13, "WEBP": 18, "AVIF": 18, "JPEG2000": 26, "PPM": 26}
_OTHER_MEMORY = 8
_STRIP = 2**18
_MOST_PAGES = 100
_MOST_PARTS = 16
_LONGEST_EXIF = 2**17
_LARGEST_PROFILE = 2**24

_EXPORT = "open it in an image program and save it as PNG or JPEG"
_FRAME = "save one frame as PNG or JPEG"
_UNPACK = "unpack it and give the image"
_FOREIGN = (
    ((b"version https://git-lfs",), "a Git LFS pointer, not the image", "run `git lfs pull`"),
    ((b"%PDF",), "a PDF document", _EXPORT),
    ((b"%!PS", b"\xc5\xd0\xd3\xc6"), "a PostScript (EPS) file", _EXPORT),
    ((b"8BPS",), "a Photoshop (PSD) file", _EXPORT),
    ((b"gimp xcf",), "a GIMP (XCF) file", _EXPORT),
    ((b"\xff\x0a", b"\0\0\0\x0cJXL "), "a JPEG XL image", _EXPORT),
    ((b"II*\0\x10\0\0\0CR", b"IIU\0", b"IIRO", b"FUJIFILM"), "a camera's raw file", _EXPORT),
    ((b"DDS ",), "a DDS texture", _EXPORT),
    ((b"\0\0\1\0",), "an icon (ICO)", _EXPORT),
    ((b"v/1\1",), "an OpenEXR image", _EXPORT),
    ((b"#?RADIANCE",), "a Radiance HDR image", _EXPORT),
    ((b"\xd7\xcd\xc6\x9a",), "a Windows metafile (WMF)", _EXPORT),
    ((b"PK\3\4",), "a ZIP archive or a PyTorch file", _UNPACK),
    ((b"\x1f\x8b",), "a gzip archive", _UNPACK),
    ((b"7z\xbc\xaf",), "a 7z archive", _UNPACK),
    ((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"), "a Python pickle", "give the image"),
    ((b"\x93NUMPY",), "a NumPy file", "load it with numpy.load and give the array"),
    ((b"\x1aE\xdf\xa3",), "a video", _FRAME),
)
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_BRANDS = dict.fromkeys(_HEIF, ["a HEIC (HEIF) image", _EXPORT])
_BRANDS[b"crx "] = ["a camera's raw file", _EXPORT]


def load_image(
    source: str | os.PathLike[str] | Image.Image | np.ndarray, background: str = "white"
) -> Image.Image:
    """Return an upright sRGB image of 8 bits a channel.

    EXIF orientation and the color profile are applied, transparency is laid over the background,
    and values of 16 bits are scaled to 8. The first frame of an animation and the largest page of a
    TIFF file are read.

    Args:
        source: a PNG, JPEG, WebP, TIFF, BMP, GIF, JPEG 2000, PPM or AVIF file, a PIL image, or an
            array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] of uint8, uint16, bool, integers in
            [0, 255] or floats in [0, 1].
        background: a color name.

    Raises:
        ImageError: the file is missing, unreadable, cut off or not an image, the image is smaller
            than 16 pixels on a side or takes more than 1 GB of memory, or its values cannot be
            understood.
        TypeError: `source` is none of these.
    """
    if isinstance(source, np.ndarray):
        return decode(_from_array(source), f"the array of shape {source.shape}", background)
    if isinstance(source, Image.Image):
        return decode(source, f"the {type(source).__name__}", background)
    if isinstance(source, (str, os.PathLike)):
        try:
            path = user_path(source)
        except PathError as error:
            raise ImageError(str(error)) from error
        with _open(path) as stream:
            return decode(stream, str(path), background)
    raise TypeError(
        f"image must be a path, a PIL image or a numpy array [h, w, 3], got {type(source).__name__}"
    )


def decode(source: Image.Image | BinaryIO, name: str, background: str = "white") -> Image.Image:
    """Return the image of a PIL image or of a file's content, as `load_image` does."""
    try:
        if isinstance(source, Image.Image):
            image = source
            _check_size(image, name)
            _load_pixels(image)
        else:
            image = _read(source, name)
        try:
            # Each entry of a hostile EXIF block may refer to all of it.
            is_long = len(image.info.get("exif", b"")) > _LONGEST_EXIF
            orientation = 1 if is_long else int(image.getexif().get(_ORIENTATION_TAG, 1))
        except Exception:
            # An image with broken EXIF data is shown as it is stored, as viewers do.
            orientation = 1
        # Binding the same name frees the stored image before the upright one is made.
        image = _to_rgb(image, name, background)
        image.getexif()[_ORIENTATION_TAG] = orientation
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large ({error}). Make it smaller") from error
    except Exception as error:
        # Decoders raise anything: OSError, NotImplementedError, RuntimeError, MemoryError.
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no decoder knows its first bytes"
        raise ImageError(
            f"{name} cannot be read ({reason}). It is damaged or cut off, or of a rare kind: "
            f"{_WANTED}. Save it again as PNG or JPEG"
        ) from error


def prepare(image: Image.Image, size: int, crop: str = "center") -> Tensor:
    """Return the image's square as float32 [3, size, size] in [-1, 1], resized with antialiasing.

    Args:
        image: an RGB image.
        size: side length in pixels.
        crop: which square of an image that is not square: "center", "top", "bottom", "left" or
            "right"; an anchor that is not on the longer axis means the center.
    """
    # `PIL.ImageOps.fit` does not begin at whole pixels, which `time_ids` needs.
    left, top, side = _square(image, crop)
    box = (left, top, left + side, top + side)
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32))
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def time_ids(image: Image.Image, size: int, crop: str = "center") -> Tensor:
    """Return SDXL's conditioning on a prepared image's size and crop, float32 [6].

    Height and width of the image before resizing; top and left of the kept square in pixels of the
    resized image, as in SDXL's own training; height and width of the square.
    """
    left, top, side = _square(image, crop)
    corner = (round(top * size / side), round(left * size / side))
    return torch.tensor([image.height, image.width, *corner, size, size], dtype=torch.float32)


def _square(image: Image.Image, crop: str) -> tuple[int, int, int]:
    side = min(image.size)
    across, down = _ANCHORS[crop]
    return round((image.width - side) * across), round((image.height - side) * down), side


def _open(path: Path) -> BinaryIO:
    try:
        stream = open_regular(path)
    except FileNotFoundError as error:
        if ":/" in str(path)[2:]:
            raise ImageError(
                f"{path} is an address: download the image and give its path"
            ) from error
        raise ImageError(f"there is no image at {path}") from error
    except OSError as error:
        raise ImageError(
            f"{path} cannot be read: {error.strerror}. Give the path of an image file"
        ) from error
    size = os.fstat(stream.fileno()).st_size
    if size > LARGEST_FILE:
        stream.close()
        raise ImageError(
            f"{path} has {size:,} bytes. An image file of at most {LARGEST_FILE:,} is needed. Make "
            "it smaller"
        )
    return stream


def _read(stream: BinaryIO, name: str) -> Image.Image:
    _check_kind(stream, name)
    try:
        return _read_by_pillow(stream, name)
    except ValueError as error:
        # Pillow refuses a PNG with more than 1 MB of text or profile.
        stream.seek(0)
        if isinstance(error, ImageError) or stream.read(8) != b"\x89PNG\r\n\x1a\n":
            raise
    plain, profile = _without_text(stream)
    image = _read_by_pillow(plain, name)
    image.info["icc_profile"] = profile
    return image


def _check_kind(stream: BinaryIO, name: str) -> None:
    start = stream.read(1024)
    if not start:
        raise ImageError(f"{name} is empty: {_WANTED}. Copy or download it again")
    brand, text = start[8:12], start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kind = next((rest for prefixes, *rest in _FOREIGN if start.startswith(prefixes)), None)
    if start[4:8] == b"ftyp" and b"avif" not in start[:64] and b"avis" not in start[:64]:
        kind = _BRANDS.get(brand, ["a video", _FRAME])
    elif start[:4] == b"RIFF" and brand == b"AVI ":
        kind = ["a video", _FRAME]
    elif text.startswith(b"<"):
        kind = ["an HTML or XML page", "download the image itself"]
        if b"<svg" in text:
            kind = ["an SVG drawing", _EXPORT]
    if kind is not None:
        raise ImageError(f"{name} is {kind[0]}: {_WANTED}. To use it, {kind[1]}")


def _read_by_pillow(stream: BinaryIO, name: str) -> Image.Image:
    file_size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    Image.init()
    # A Pillow before 11.3 has no AVIF.
    image: Image.Image = Image.open(stream, formats=[x for x in _FORMATS if x in Image.OPEN])
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _seek_largest_page(image, stream, name)
    _check_size(image, name, file_size)
    _load_pixels(image)
    return image


def _load_pixels(image: Any) -> None:
    tiles = getattr(image, "tile", ())
    if image.format == "PNG" and tiles and "transparency" in image.info:
        # Pillow scales the pixels to 8 bits and not the transparent color.
        raw_mode, key = tiles[0][3], image.info["transparency"]
        if raw_mode in ("L;2", "L;4"):
            image.info["transparency"] = key * (85 if raw_mode == "L;2" else 17)
        elif raw_mode == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in key)
    image.load()


def _seek_largest_page(image: TiffImagePlugin.TiffImageFile, stream: BinaryIO, name: str) -> None:
    """Go to the largest page of a TIFF file: small ones are previews."""
    stream.seek(0)
    header = stream.read(8)
    areas: list[int] = []
    seen: set[int] = set()
    largest_part = 0
    for page in range(_MOST_PAGES + 1):
        try:
            image.seek(page)
        except Exception:
            # It is the last, or the rest is damaged.
            break
        areas.append(image.width * image.height)
        parts = image.tag_v2.get(330, ())  # SubIFDs
        for offset in parts if isinstance(parts, tuple) else (parts,):
            # A small file may have many parts in the place of a large one.
            if offset not in seen and len(seen) < _MOST_PARTS:
                seen.add(offset)
                part = TiffImagePlugin.ImageFileDirectory_v2(header)
                stream.seek(offset)
                part.load(stream)
                largest_part = max(largest_part, part.get(256, 0) * part.get(257, 0))
    if len(areas) > _MOST_PAGES:
        raise ImageError(
            f"{name} has more than {_MOST_PAGES} pages. One image is needed. Save its page as PNG"
        )
    largest = max(areas)
    if largest_part > largest:
        raise ImageError(
            f"{name} is a camera's raw file, of which only a preview can be read: {_WANTED}. To "
            f"use it, {_EXPORT}"
        )
    image.seek(areas.index(largest))


def _without_text(stream: BinaryIO) -> tuple[BinaryIO, bytes]:
    """Return a copy of a PNG file without text and color profile, and the profile."""
    stream.seek(0)
    copy, profile = io.BytesIO(), b""
    copy.write(stream.read(8))
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        content = stream.read(length + 4)
        if kind == b"iCCP":
            packed = content[content.index(b"\0") + 2 : -4]
            profile = zlib.decompressobj().decompress(packed, _LARGEST_PROFILE)
        elif kind not in (b"tEXt", b"zTXt", b"iTXt"):
            copy.write(head + content)
    return copy, profile


def _check_size(image: Image.Image, name: str, file_size: int = 0) -> None:
    if min(image.size) < SMALLEST_SIDE:
        raise ImageError(
            f"{name} is {image.width}×{image.height} pixels: an image of at least "
            f"{SMALLEST_SIDE}×{SMALLEST_SIDE} is needed"
        )
    kind = "progressive" if "progressive" in image.info else image.format
    per_pixel = _MEMORY.get(str(kind), _OTHER_MEMORY)
    if image.width * image.height * per_pixel + file_size > _MOST_MEMORY:
        most = (_MOST_MEMORY - file_size) // per_pixel // 10**6
        raise ImageError(
            f"{name} is {image.width}×{image.height} pixels, and reading it takes more than 1 GB "
            f"of memory. At most {most} million pixels can be read. Make it smaller"
        )


def _to_rgb(image: Image.Image, name: str, background: str) -> Image.Image:
    """Convert strip by strip, so that no second copy at a wider type is in memory."""
    is_deep = image.mode[0] in "IF"
    highest = _highest(image, name) if is_deep else 255
    # Pillow inverts grayscale with white as zero at 8 bits only.
    is_negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == 0
    profile = _to_srgb(image, name)
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        alpha = None
        if is_deep:
            values = np.asarray(strip)
            if not np.isfinite(values).all():
                raise ImageError(f"{name} holds values that are not finite numbers")
            if "transparency" in image.info:
                alpha = Image.fromarray(values != image.info["transparency"]).convert("L")
            scaled = np.rint(values.astype(np.float64) * (255 / highest))
            strip = Image.fromarray((255 - scaled if is_negative else scaled).astype(np.uint8))
        elif strip.has_transparency_data:
            # Pillow converts premultiplied gray to nothing else.
            strip = strip.convert("LA") if strip.mode == "La" else strip
            strip = strip.convert("RGBA")
            alpha = strip.getchannel("A")
        if profile is not None:
            mode, transform = profile
            strip = ImageCms.applyTransform(strip.convert(mode), transform)
        strip = strip.convert("RGB")
        if alpha is not None:
            strip.putalpha(alpha)
            under = Image.new("RGBA", strip.size, background)
            strip = Image.alpha_composite(under, strip).convert("RGB")
        result.paste(strip, (0, top))
    return result


def _highest(image: Image.Image, name: str) -> int:
    """Return the value of white in a wide grayscale image: that of the smallest range that fits."""
    if image.mode.startswith("I;16"):
        return 4095 if getattr(image, "tag_v2", {}).get(_BITS_TAG) == (12,) else 65535
    if image.mode == "I" and image.format in ("PPM", "PNG"):
        return 65535
    low, high = image.getextrema()  # type: ignore[no-untyped-call, unused-ignore]
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name} has values from {low:g} to {high:g}: an image of 8 or 16 bits a channel, or "
            "of floats in [0, 1], is needed"
        )
    return 1 if high <= 1 else 255 if high <= 255 else 65535


def _to_srgb(image: Image.Image, name: str) -> tuple[str, Any] | None:
    """Return the color mode to convert to and the transform from it to sRGB, if any."""
    embedded = image.info.get("icc_profile")
    if not embedded and image.mode != "LAB":
        return None
    try:
        profile: Any
        if image.mode == "LAB":
            mode, profile = "LAB", ImageCms.createProfile("LAB")
        else:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded or b""))
            space = profile.profile.xcolor_space
            mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[space]
            is_gray = Image.getmodebase(image.mode) == "L"
            if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not is_gray):
                raise ValueError(f"it is for {space}, and the image is {image.mode}")
        return mode, ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception as error:
        # Viewers show such an image too.
        logger.warning(printable(f"the color profile of {name} is ignored: {error}"))
        return None


def _from_array(array: np.ndarray) -> Image.Image:
    name = f"the array of shape {array.shape} and type {array.dtype}"
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0:
        raise ImageError(
            f"{name} is not an image: [h, w], [h, w, 3] or [h, w, 4] is wanted. If its channels "
            "come first, transpose it with (1, 2, 0)"
        )
    if array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    kind = array.dtype.kind
    if kind not in "biuf" or not np.isfinite(array).all():
        raise ImageError(f"{name} holds values that are not finite numbers")
    is_wide = kind == "u" and array.dtype.itemsize == 2
    highest = 65535 if is_wide else 1 if kind in "bf" else 255
    if array.min() < 0 or array.max() > highest:
        raise ImageError(
            f"{name} has values from {array.min():g} to {array.max():g}: floats in [0, 1] or "
            "integers in [0, 255] are wanted"
        )
    result = np.empty(array.shape, np.uint8)
    for row, values in zip(result, array, strict=True):
        row[...] = np.rint(values * (255 / highest))
    return Image.fromarray(result)
