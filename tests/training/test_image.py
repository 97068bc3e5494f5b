"""Images and masks of every kind become upright RGB squares, and others a clear error."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from training.shared import random_image

from sefi_fast.errors import ImageError
from sefi_fast.training import load_image, prepare
from sefi_fast.training.image import time_ids
from sefi_fast.training.latents import check_selection, load_mask, open_mask

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(size: int = 32) -> Image.Image:
    """Red, green / blue, white: every turn and mirror image of it differs."""
    pixels = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    pixels[:half, :half], pixels[:half, half:] = RED, GREEN
    pixels[half:, :half], pixels[half:, half:] = BLUE, WHITE
    return Image.fromarray(pixels)


def assert_quarters(image: Image.Image, tolerance: int, wanted=(RED, GREEN, BLUE, WHITE)) -> None:
    assert (image.mode, image.size) == ("RGB", (32, 32))
    found = [image.getpixel(at) for at in ((2, 2), (29, 2), (2, 29), (29, 29))]
    assert np.abs(np.subtract(found, wanted)).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr", "RGBX", "HSV"])
def test_color_modes_give_the_same_colors(mode):
    assert_quarters(load_image(quarters().convert(mode)), 3)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "1"])
def test_gray_modes(mode):
    gray = quarters().convert("L")
    if mode == "1":
        gray = gray.point(lambda value: 255 * (value > 128))
    given = gray.convert("LA") if mode == "La" else gray
    loaded = load_image(given.convert(mode))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(gray.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_file_formats(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    quarters().save(path)
    loaded = load_image(str(path))
    path.unlink()
    assert_quarters(loaded, 40)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation(tmp_path, suffix):
    # Stored images that viewers turn upright, by their EXIF orientations from 2 on.
    turns = (
        "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE",
        "ROTATE_270",
    )  # fmt: skip
    for orientation, turn in enumerate((None, *turns), 1):
        stored = quarters() if turn is None else quarters().transpose(Image.Transpose[turn])
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"turned.{suffix}", exif=exif)
        assert_quarters(load_image(tmp_path / f"turned.{suffix}"), 60)


def test_broken_exif_is_ignored(tmp_path):
    for exif in (b"Exif\x00\x00not exif at all", b"Exif\x00\x00" + bytes(2**16 - 10)):
        quarters().save(tmp_path / "odd.jpg", exif=exif)
        assert_quarters(load_image(tmp_path / "odd.jpg"), 60)
    huge = quarters()
    huge.info["exif"] = bytes(2**18)
    assert_quarters(load_image(huge), 0)


@pytest.mark.parametrize("dtype", [">u2", "<u2"])
def test_sixteen_bit_gray(tmp_path, dtype):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    wanted = np.rint(ramp / 257).astype(np.uint8)
    for source in (tmp_path / "deep.png", ramp.astype(dtype), Image.fromarray(ramp.astype("i4"))):
        np.testing.assert_array_equal(np.asarray(load_image(source))[..., 1], wanted)


def test_float_images():
    ramp = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    for source in (Image.fromarray(ramp), ramp):
        difference = np.asarray(load_image(source))[..., 0] - np.rint(ramp * 255)
        assert np.abs(difference).max() <= 1
    with pytest.raises(ImageError, match="values from"):
        load_image(Image.fromarray(ramp - 0.5))
    with pytest.raises(ImageError, match="values"):
        load_image(Image.fromarray(np.full((32, 32), np.nan, np.float32)))


def test_transparency_is_laid_over_white(tmp_path):
    layered = quarters().convert("RGBA")
    layered.putalpha(Image.linear_gradient("L").resize((32, 32)))
    wanted = Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), layered).convert("RGB")
    layered.save(tmp_path / "layered.png")
    for source in (layered, tmp_path / "layered.png"):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(wanted))
    palette = quarters().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((2, 2)))
    quarters().save(tmp_path / "keyed.png", transparency=RED)
    for name in ("palette.png", "keyed.png"):
        assert_quarters(load_image(tmp_path / name), 3, (WHITE, GREEN, BLUE, WHITE))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (24, 24), color) for color in (RED, GREEN, BLUE)]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert np.abs(np.subtract(load_image(path).getpixel((12, 12)), RED)).max() <= 3


PIXELS = np.asarray(quarters())
GRAY = np.repeat(PIXELS[..., :1], 3, 2)
ARRAYS = {
    "uint8": (PIXELS, PIXELS),
    "int64": (PIXELS.astype(np.int64), PIXELS),
    "strided": (PIXELS[::-1][::-1], PIXELS),
    "float64": (PIXELS.astype(np.float64) / 255, PIXELS),
    "uint16": (PIXELS.astype(np.uint16) * 257, PIXELS),
    "rgba": (np.asarray(quarters().convert("RGBA")), PIXELS),
    "bool": (PIXELS[..., 0] > 128, GRAY),
    "one channel": (PIXELS[..., :1], GRAY),
}


@pytest.mark.parametrize(("array", "wanted"), ARRAYS.values(), ids=list(ARRAYS))
def test_arrays(array, wanted):
    np.testing.assert_array_equal(np.asarray(load_image(array)), wanted)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((3, 32, 32), np.uint8), ImageError, "transpose"),
        (np.zeros((32, 32, 2), np.uint8), ImageError, "is not an image"),
        (np.zeros((0, 32, 3), np.uint8), ImageError, "is not an image"),
        (np.full((32, 32, 3), 300), ImageError, "values from 300 to 300"),
        (np.full((32, 32, 3), -1.0), ImageError, "values from -1"),
        (np.full((32, 32, 3), np.nan), ImageError, "finite"),
        (np.full((32, 32, 3), "x"), ImageError, "not finite numbers"),
        (np.zeros((15, 400, 3), np.uint8), ImageError, "at least 16×16"),
        ("missing.png", ImageError, "no image at"),
        (".", ImageError, "is a folder"),
        ("https://example.org/me.jpg", ImageError, "download"),
        ([[0, 1]], TypeError, "got list"),
    ],
)
def test_sources_that_are_not_images(source, error, message):
    with pytest.raises(error, match=message):
        load_image(source)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_files_cut_off_at_any_place(tmp_path, suffix):
    whole = io.BytesIO()
    random_image(0, 96, 96).save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    path = tmp_path / f"cut.{suffix}"
    for kept in (0.3, 0.7, 0.95):
        path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * kept)])
        with pytest.raises(ImageError, match="cut"):
            load_image(path)
    if suffix == "png":
        with Image.open(path) as image, pytest.raises(ImageError, match="damaged or cut off"):
            load_image(image)


def test_prepare_keeps_an_image_of_the_right_size_and_antialiases_others():
    pixels = prepare(quarters(48), 48)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    back = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(back, np.asarray(quarters(48)))
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    assert prepare(load_image(board), 32).abs().max() < 0.05


@pytest.mark.parametrize(
    ("crop", "wide", "tall", "wide_corner", "tall_corner"),
    [
        ("center", GREEN, GREEN, (0, 16), (16, 0)),
        ("top", GREEN, RED, (0, 16), (0, 0)),
        ("bottom", GREEN, BLUE, (0, 16), (32, 0)),
        ("left", RED, GREEN, (0, 0), (16, 0)),
        ("right", BLUE, GREEN, (0, 32), (16, 0)),
    ],
)
def test_crops_and_the_sizes_that_sdxl_is_given(crop, wide, tall, wide_corner, tall_corner):
    thirds = np.zeros((20, 60, 3), np.uint8)
    thirds[:, :20], thirds[:, 20:40], thirds[:, 40:] = RED, GREEN, BLUE
    for pixels, wanted, corner in (
        (thirds, wide, wide_corner),
        (thirds.transpose(1, 0, 2), tall, tall_corner),
    ):
        image = load_image(pixels)
        color = (prepare(image, 16, crop).mean((1, 2)) + 1) * 127.5
        np.testing.assert_allclose(color, wanted, atol=1)
        found = time_ids(image, 16, crop)
        assert found.dtype == torch.float32
        assert found.tolist() == [image.height, image.width, *corner, 16, 16]


@pytest.fixture
def shape():
    """A bright square, right of the middle of an image that is wider than high."""
    array = np.zeros((60, 100), dtype=bool)
    array[20:40, 60:80] = True
    return array


@pytest.mark.parametrize("crop", ["center", "top", "right"])
def test_a_mask_is_cropped_as_its_image(shape, crop):
    image = Image.fromarray(shape.astype(np.uint8) * 255).convert("RGB")
    mask = load_mask(shape, image, 30, crop)
    pixels = (prepare(image, 30, crop).mean(0) + 1) / 2
    torch.testing.assert_close(mask, pixels.clamp(0, 1))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.ones((60, 99), bool), ImageError, "99×60 pixels and its image 100×60"),
        (np.zeros((60, 100), bool), ImageError, "empty"),
        (np.full((60, 100), 2.0), ImageError, "the mask: .*floats in"),
        ("missing.png", ImageError, "the mask: there is no image"),
        (7, TypeError, "path"),
    ],
)
def test_masks_that_cannot_be_used(source, error, message):
    with pytest.raises(error, match=message):
        load_mask(source, Image.new("RGB", (100, 60)), 20)


def test_a_mask_of_a_cropped_subject_is_refused(shape):
    shape[:, :] = False
    shape[:, 90:] = True
    with pytest.raises(ImageError, match="the left square is kept"):
        load_mask(shape, Image.new("RGB", (100, 60)), 20, "left")


def quarter(mode: str, outside, inside, **options):
    """A mask as a file: one quarter of the image is white."""
    mask = Image.new(mode, (64, 64), outside)
    mask.paste(inside, (16, 16, 48, 48))
    stream = io.BytesIO()
    mask.save(stream, "PNG", **options)
    return Image.open(stream)


OPAQUE, CLEAR, CLEAR_WHITE = (255,) * 4, (0,) * 4, (255, 255, 255, 0)
QUARTERS = {
    "RGBA on black": ("RGBA", CLEAR, OPAQUE, {}),
    "RGBA on white": ("RGBA", CLEAR_WHITE, OPAQUE, {}),
    "LA on black": ("LA", (0, 0), (255, 255), {}),
    "LA on white": ("LA", (255, 0), (255, 255), {}),
    "gray with a transparent black": ("L", 0, 255, {"transparency": 0}),
    "bits with a transparent black": ("1", 0, 1, {"transparency": 0}),
    "16 bits with a transparent gray": ("I;16", 65535, 65534, {"transparency": 65535}),
    "RGB with a transparent green": ("RGB", (0, 255, 0), (255,) * 3, {"transparency": (0, 255, 0)}),
    "palette with a transparent white": ("P", 7, 8, {"transparency": 7}),
    "opaque": ("RGB", 0, (255,) * 3, {}),
}


@pytest.mark.parametrize(("mode", "outside", "inside", "options"), QUARTERS.values(), ids=QUARTERS)
def test_transparent_parts_are_not_the_subject(mode, outside, inside, options):
    if mode == "P":
        mask = quarter("L", outside, inside)
        mask = mask.convert("P")
        mask.putpalette([255] * 768)
        mask.info["transparency"] = 7
    else:
        mask = quarter(mode, outside, inside, **options)
    image = Image.new("RGB", (64, 64))
    found = load_mask(mask, image, 64)
    assert abs(found.mean().item() - 0.25) < 0.01 and found[32, 32] > 0.99
    assert np.asarray(open_mask(mask).convert("L")).mean() == pytest.approx(255 / 4, abs=1)


def test_an_empty_mask_is_refused_and_a_full_one_gives_a_warning(caplog):
    image = Image.new("RGB", (64, 64))
    for nothing in (
        quarter("RGBA", CLEAR, (0, 0, 0, 255)),
        quarter("RGBA", CLEAR_WHITE, CLEAR),
    ):
        with pytest.raises(ImageError, match="white .* black or transparent"):
            load_mask(nothing, image, 32)
        with pytest.raises(ImageError, match="empty in here"):
            check_selection(0, np.asarray(open_mask(nothing)).max() / 255, "here")
    assert not caplog.records
    assert load_mask(np.ones((64, 64), bool), image, 32).min() == 1
    assert "white everywhere" in caplog.text
