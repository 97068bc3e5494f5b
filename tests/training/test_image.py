"""Images of every kind become upright RGB, and broken ones a clear error."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sefi_fast.errors import ImageError
from sefi_fast.training import load_image, prepare
from sefi_fast.training.image import time_ids

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(size: int = 32) -> Image.Image:
    """Red, green / blue, white: every turn and mirror image of it differs."""
    pixels = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    pixels[:half, :half], pixels[:half, half:] = RED, GREEN
    pixels[half:, :half], pixels[half:, half:] = BLUE, WHITE
    return Image.fromarray(pixels)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    w, h = image.size
    return [image.getpixel(at) for at in ((2, 2), (w - 3, 2), (2, h - 3), (w - 3, h - 3))]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr", "RGBX", "HSV"])
def test_colour_modes_give_the_same_colours(mode):
    loaded = load_image(quarters().convert(mode))
    assert loaded.mode == "RGB"
    difference = np.abs(np.asarray(loaded).astype(int) - np.asarray(quarters()))
    assert difference.max() <= 3


@pytest.mark.parametrize("mode", ["L", "LA", "La", "1"])
def test_grey_modes(mode):
    grey = quarters().convert("L")
    given = grey.convert("LA" if mode == "La" else mode)
    loaded = load_image(given.convert(mode) if mode != "1" else grey.point(lambda v: v > 128, "1"))
    assert loaded.mode == "RGB"
    pixels = np.asarray(loaded)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    if mode != "1":
        np.testing.assert_array_equal(pixels[..., 0], np.asarray(grey))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_file_formats(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    quarters().save(path)
    loaded = load_image(str(path))
    assert loaded.mode == "RGB"
    assert loaded.size == (32, 32)
    for got, wanted in zip(corners(loaded), (RED, GREEN, BLUE, WHITE), strict=True):
        assert np.abs(np.subtract(got, wanted)).max() < 40
    path.unlink()
    loaded.getpixel((0, 0))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    from sefi_fast.training.image import _UPRIGHT

    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = quarters()
    if orientation in _UPRIGHT:
        stored = stored.transpose(inverse.get(orientation, _UPRIGHT[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif)
    for got, wanted in zip(corners(load_image(path)), (RED, GREEN, BLUE, WHITE), strict=True):
        assert np.abs(np.subtract(got, wanted)).max() < 60


def test_broken_exif_is_ignored(tmp_path):
    path = tmp_path / "odd.jpg"
    quarters().save(path, exif=b"Exif\x00\x00not exif at all")
    assert load_image(path).size == (32, 32)


@pytest.mark.parametrize("dtype", [">u2", "<u2"])
def test_sixteen_bit_grey(tmp_path, dtype):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(ramp).save(path)
    wanted = np.rint(ramp / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(path))[..., 0], wanted)
    np.testing.assert_array_equal(np.asarray(load_image(ramp.astype(dtype)))[..., 1], wanted)
    wide = Image.fromarray(ramp.astype(np.int32))
    assert wide.mode == "I"
    np.testing.assert_array_equal(np.asarray(load_image(wide))[..., 2], wanted)


def test_sixteen_bit_rgb_png(tmp_path):
    rows = b"".join(b"\x00" + struct.pack(">3H", 65535, 32896, 0) * 20 for _ in range(20))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">2I5B", 20, 20, 16, 2, 0, 0, 0)
    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert load_image(path).getpixel((5, 5)) == (255, 128, 0)


def test_float_pictures():
    ramp = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    wanted = np.rint(ramp * 255)
    assert np.abs(np.asarray(load_image(Image.fromarray(ramp)))[..., 0] - wanted).max() <= 1
    assert np.abs(np.asarray(load_image(ramp))[..., 0] - wanted).max() <= 1
    with pytest.raises(ImageError, match="values from"):
        load_image(Image.fromarray(ramp - 0.5))
    with pytest.raises(ImageError, match="values"):
        load_image(Image.fromarray(np.full((32, 32), np.nan, np.float32)))


def test_transparency_is_laid_over_white(tmp_path):
    layered = quarters().convert("RGBA")
    layered.putalpha(Image.linear_gradient("L").resize((32, 32)))
    wanted = Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), layered).convert("RGB")
    np.testing.assert_array_equal(np.asarray(load_image(layered)), np.asarray(wanted))
    path = tmp_path / "layered.png"
    layered.save(path)
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(wanted))


def test_transparent_palette_and_colour_key(tmp_path):
    palette = quarters().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    clear = palette.getpixel((2, 2))
    palette.save(tmp_path / "palette.png", transparency=clear)
    quarters().save(tmp_path / "keyed.png", transparency=RED)
    for name in ("palette.png", "keyed.png"):
        got = corners(load_image(tmp_path / name))
        assert np.abs(np.subtract(got, (WHITE, GREEN, BLUE, WHITE))).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (24, 24), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert np.abs(np.subtract(load_image(path).getpixel((12, 12)), RED)).max() <= 3


@pytest.mark.parametrize(
    "array",
    [
        np.asarray(quarters()),
        np.asarray(quarters()).astype(np.int64),
        np.asarray(quarters())[::-1][::-1],
        np.asarray(quarters()).astype(np.float64) / 255,
        np.asarray(quarters()).astype(np.uint16) * 257,
        np.asarray(quarters().convert("RGBA")),
    ],
    ids=["uint8", "int64", "strided", "float64", "uint16", "rgba"],
)
def test_arrays(array):
    np.testing.assert_array_equal(np.asarray(load_image(array)), np.asarray(quarters()))


def test_grey_arrays():
    mask = np.asarray(quarters().convert("L")) > 128
    for array in (mask, mask[..., None], mask.astype(np.uint8) * 255):
        assert load_image(array).getpixel((30, 30)) == WHITE


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 32, 32), np.uint8), "transpose"),
        (np.zeros((32, 32, 2), np.uint8), "is no image"),
        (np.zeros((4, 32, 32, 3), np.uint8), "is no image"),
        (np.zeros((0, 32, 3), np.uint8), "is no image"),
        (np.full((32, 32, 3), 300), "values from 300 to 300"),
        (np.full((32, 32, 3), -1.0), "values from -1"),
        (np.full((32, 32, 3), 128.0), "floats in"),
        (np.full((32, 32, 3), np.nan), "finite"),
        (np.full((32, 32, 3), "x"), "no finite numbers"),
        (np.zeros((15, 400, 3), np.uint8), "at least 16×16"),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


def test_files_that_are_no_pictures(tmp_path):
    with pytest.raises(ImageError, match="no image at"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="download"):
        load_image("https://example.org/me.jpg")
    for content in (b"", b"no image, but text", bytes(1000)):
        path = tmp_path / "content.jpg"
        path.write_bytes(content)
        with pytest.raises(ImageError, match="content.jpg"):
            load_image(path)
    with pytest.raises(TypeError, match="path, a PIL image or a numpy array"):
        load_image(3)
    with pytest.raises(TypeError, match="got list"):
        load_image([[0, 1]])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_files_cut_off_at_any_place(tmp_path, suffix, kept):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * kept)])
    with pytest.raises(ImageError, match="cut"):
        load_image(path)


def test_a_lazily_opened_picture_that_is_cut_off(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    path = tmp_path / "cut.png"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:9000])
    with Image.open(path) as image, pytest.raises(ImageError, match="damaged or cut off"):
        load_image(image)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (301, 33), (33, 640), (1001, 999)])
def test_prepare_gives_a_square_in_range(size):
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels = prepare(load_image(noise), 48)
    assert pixels.shape == (3, 48, 48)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_prepare_leaves_a_picture_of_the_right_size_alone():
    pixels = prepare(quarters(48), 48)
    back = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(back, np.asarray(quarters(48)))


@pytest.mark.parametrize(
    ("crop", "wide", "tall"),
    [
        ("center", GREEN, GREEN),
        ("top", GREEN, RED),
        ("bottom", GREEN, BLUE),
        ("left", RED, GREEN),
        ("right", BLUE, GREEN),
    ],
)
def test_crops(crop, wide, tall):
    thirds = np.zeros((20, 60, 3), np.uint8)
    thirds[:, :20], thirds[:, 20:40], thirds[:, 40:] = RED, GREEN, BLUE
    for pixels, wanted in ((thirds, wide), (thirds.transpose(1, 0, 2), tall)):
        got = prepare(load_image(pixels), 16, crop)
        colour = (got.mean((1, 2)) + 1) * 127.5
        np.testing.assert_allclose(colour, wanted, atol=1)


@pytest.mark.parametrize(
    ("crop", "wide", "tall"),
    [
        ("center", (0, 16), (16, 0)),
        ("top", (0, 16), (0, 0)),
        ("bottom", (0, 16), (32, 0)),
        ("left", (0, 0), (16, 0)),
        ("right", (0, 32), (16, 0)),
    ],
)
def test_size_and_crop_are_told_in_pixels_of_the_resized_picture(crop, wide, tall):
    for size, corner in (((60, 20), wide), ((20, 60), tall)):
        found = time_ids(Image.new("RGB", size), 16, crop)
        assert found.dtype == torch.float32
        assert found.tolist() == [size[1], size[0], *corner, 16, 16]


def test_downsizing_is_antialiased():
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    assert prepare(load_image(board), 32).abs().max() < 0.05
