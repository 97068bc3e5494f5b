"""swap_sheet: the images of every pair of prompts, each where it belongs."""

from __future__ import annotations

import numpy as np
import pytest

from sefi_fast import load_pipeline, swap
from sefi_fast.evaluation import swap_sheet

PROMPTS = ("a photo of a red creature", "a photo of a blue creature")


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline(None, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_rows_are_keys_and_columns_are_values(pipe):
    sampling = {"steps": 6, "guidance": 3.0}
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    sheet = np.asarray(swap_sheet(pipe, PROMPTS, seed=5, panel_size=side, **sampling))
    places = {}
    for row, keys in enumerate(PROMPTS):
        for column, values in enumerate(PROMPTS):
            (image,) = swap(pipe, key_prompt=keys, value_prompt=values, seed=5, **sampling)
            places[row, column] = _find(sheet, np.asarray(image))
    tops = {key: place[0] for key, place in places.items()}
    lefts = {key: place[1] for key, place in places.items()}
    assert tops[0, 0] == tops[0, 1] < tops[1, 0] == tops[1, 1]
    assert lefts[0, 0] == lefts[1, 0] < lefts[0, 1] == lefts[1, 1]


def _find(sheet: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """Top left corner of the one place where the image stands."""
    height, width = image.shape[:2]
    corner = np.argwhere((sheet == image[0, 0]).all(-1))
    found = [
        (int(top), int(left))
        for top, left in corner
        if sheet[top : top + height, left : left + width].shape == image.shape
        and (sheet[top : top + height, left : left + width] == image).all()
    ]
    assert len(found) == 1
    return found[0]


def test_one_prompt_is_no_comparison(pipe):
    with pytest.raises(ValueError, match="at least two prompts"):
        swap_sheet(pipe, PROMPTS[:1])
    with pytest.raises(ValueError, match="at least two prompts"):
        swap_sheet(pipe, PROMPTS[0])
