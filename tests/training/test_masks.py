"""Masks are cut and resized as their image is, and refused when they do not belong to it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sefi_fast.errors import ImageError
from sefi_fast.training.image import prepare
from sefi_fast.training.latents import check_selection, load_mask, open_mask


@pytest.fixture
def shape():
    """A bright square, right of the middle of an image that is wider than high."""
    array = np.zeros((60, 100), dtype=bool)
    array[20:40, 60:80] = True
    return array


@pytest.mark.parametrize("crop", ["center", "top", "right"])
def test_a_mask_lies_where_its_picture_does(shape, crop):
    picture = Image.fromarray(shape.astype(np.uint8) * 255).convert("RGB")
    mask = load_mask(shape, picture, 30, crop)
    pixels = (prepare(picture, 30, crop).mean(0) + 1) / 2
    assert mask.shape == (30, 30)
    assert mask.dtype == torch.float32
    assert 0 <= mask.min() < mask.max() <= 1
    torch.testing.assert_close(mask, pixels.clamp(0, 1))
    first = {"center": 20, "top": 20, "right": 10}[crop]
    assert mask[10:20, first : first + 10].min() > 0.4
    assert mask[:9].max() < 0.1


def test_files_arrays_and_pictures_are_one(shape, tmp_path):
    picture = Image.new("RGB", (100, 60))
    path = tmp_path / "mask.png"
    Image.fromarray(shape.astype(np.uint8) * 255).save(path)
    masks = [
        load_mask(source, picture, 20)
        for source in (path, str(path), Image.open(path), shape, shape.astype(np.float32))
    ]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


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


def test_a_subject_that_is_cut_away_is_told(shape):
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


WHITE, CLEAR, CLEAR_WHITE = (255,) * 4, (0,) * 4, (255, 255, 255, 0)
QUARTERS = {
    "RGBA on black": ("RGBA", CLEAR, WHITE, {}),
    "RGBA on white": ("RGBA", CLEAR_WHITE, WHITE, {}),
    "LA on black": ("LA", (0, 0), (255, 255), {}),
    "LA on white": ("LA", (255, 0), (255, 255), {}),
    "grey with a transparent black": ("L", 0, 255, {"transparency": 0}),
    "bits with a transparent black": ("1", 0, 1, {"transparency": 0}),
    "16 bits with a transparent grey": ("I;16", 65535, 65534, {"transparency": b"\xff\xff"}),
    "RGB with a transparent green": ("RGB", (0, 255, 0), (255,) * 3, {"transparency": (0, 255, 0)}),
    "palette with a transparent white": ("P", 7, 8, {"transparency": 7}),
    "opaque": ("RGB", 0, (255,) * 3, {}),
}


@pytest.mark.parametrize(("mode", "outside", "inside", "options"), QUARTERS.values(), ids=QUARTERS)
def test_what_is_transparent_is_not_the_subject(mode, outside, inside, options):
    if mode == "I;16":
        array = np.full((64, 64), 65535, np.uint16)
        array[16:48, 16:48] = 65534
        mask = Image.fromarray(array)
        mask.info["transparency"] = 65535
    elif mode == "P":
        mask = quarter("L", outside, inside)
        mask = mask.convert("P")
        mask.putpalette([255] * 768)
        mask.info["transparency"] = 7
    else:
        mask = quarter(mode, outside, inside, **options)
    picture = Image.new("RGB", (64, 64))
    found = load_mask(mask, picture, 64)
    assert abs(found.mean().item() - 0.25) < 0.01 and found[32, 32] > 0.99
    assert np.asarray(open_mask(mask).convert("L")).mean() == pytest.approx(255 / 4, abs=1)


def test_a_mask_that_selects_nothing_is_refused_and_one_that_selects_all_is_told(caplog):
    picture = Image.new("RGB", (64, 64))
    for nothing in (
        quarter("RGBA", CLEAR, (0, 0, 0, 255)),
        quarter("RGBA", WHITE[:3] + (0,), CLEAR),
    ):
        with pytest.raises(ImageError, match="white .* black or transparent"):
            load_mask(nothing, picture, 32)
        with pytest.raises(ImageError, match="empty in here"):
            check_selection(0, np.asarray(open_mask(nothing)).max() / 255, "here")
    assert not caplog.records
    assert load_mask(np.ones((64, 64), bool), picture, 32).min() == 1
    assert "white everywhere" in caplog.text
