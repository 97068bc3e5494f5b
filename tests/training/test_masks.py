"""Masks are cut and resized as their picture is, and refused when they do not belong to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sefi_fast.errors import ImageError
from sefi_fast.training.image import prepare
from sefi_fast.training.masks import load_mask


@pytest.fixture
def shape():
    """A bright square, right of the middle of a picture that is wider than high."""
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
        (np.ones((60, 99), bool), ImageError, "99×60 pixels and its picture 100×60"),
        (np.zeros((60, 100), bool), ImageError, "empty"),
        (np.full((60, 100), 2.0), ImageError, "the mask: .*floats in"),
        ("missing.png", ImageError, "the mask: there is no picture"),
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
