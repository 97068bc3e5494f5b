"""Contact sheets, swap sheets and curves: sizes, contents, and refusal of nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sefi_fast import load_pipeline, swap
from sefi_fast.evaluation import Panel, contact_sheet, swap_sheet, training_curves, validation_sheet


def solid(color: tuple[int, int, int], size=(48, 48)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_every_image_of_every_row_is_on_the_sheet():
    colors = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200)]
    panels = [Panel(solid(color), f"number {n}") for n, color in enumerate(colors)]
    sheet = contact_sheet([("first", panels[:3]), ("", panels[3:])], title="title", panel_size=96)
    pixels = np.asarray(sheet).reshape(-1, 3)
    for color in colors:
        assert (pixels == color).all(axis=1).sum() == 96 * 96


def test_proportions_are_kept():
    sheet = contact_sheet([("", [Panel(solid((9, 9, 200), (60, 30)))])], panel_size=120)
    pixels = (np.asarray(sheet) == (9, 9, 200)).all(axis=2)
    assert pixels.any(axis=1).sum() == 60 and pixels.any(axis=0).sum() == 120


def test_a_long_caption_is_wrapped_and_a_long_heading_widens_the_sheet():
    short, long, headed = (
        contact_sheet([(heading, [Panel(solid((0, 0, 0)), caption)])])
        for heading, caption in (("", "x"), ("", "many words in a caption " * 3), ("h" * 90, "x"))
    )
    assert long.width == short.width < headed.width and long.height > short.height


def test_nothing_to_show_is_refused():
    with pytest.raises(ValueError, match="no images"):
        contact_sheet([("empty", [])])
    with pytest.raises(ValueError, match="empty history"):
        training_curves(SimpleNamespace(loss=[], subject_loss=[], seconds=[]))


def test_curves_show_both_series():
    rng = np.random.default_rng(0)
    history = SimpleNamespace(loss=list(rng.random(40) + 0.1), subject_loss=list(rng.random(40)),
                              seconds=list(range(40)))  # fmt: skip
    image = np.asarray(training_curves(history)).astype(int)
    left, right = np.split(image, [image.shape[1] // 2], axis=1)
    assert (left[..., 2] - left[..., 0] > 60).sum() > 200
    assert (right[..., 0] - right[..., 2] > 60).sum() > 200


def test_validation_images_may_outnumber_their_captions():
    history = SimpleNamespace(validation=[(5, [solid((9, 9, 9)), solid((8, 8, 8))])])
    assert (
        validation_sheet(history, ["one"]).width
        == contact_sheet([("step 5", [Panel(solid((9, 9, 9)), "one")])]).width
    )


def test_a_swap_sheet_has_keys_by_row_and_values_by_column():
    pipe = load_pipeline(None, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = ("a photo of a red creature", "a photo of a blue creature")
    sampling = {"steps": 6, "guidance": 3.0, "seed": 5}
    sheet = np.asarray(swap_sheet(pipe, prompts, panel_size=48, **sampling))
    corners = {}
    for row, keys in enumerate(prompts):
        for column, values in enumerate(prompts):
            (image,) = swap(pipe, key_prompt=keys, value_prompt=values, **sampling)
            windows = np.lib.stride_tricks.sliding_window_view(sheet, (48, 48, 3))[:, :, 0]
            starts = np.argwhere((sheet[:-47, :-47] == np.asarray(image)[0, 0]).all(-1))
            (corners[row, column],) = [
                tuple(at) for at in starts if (windows[tuple(at)] == np.asarray(image)).all()
            ]
    assert corners[0, 0][0] == corners[0, 1][0] < corners[1, 0][0] == corners[1, 1][0]
    assert corners[0, 0][1] == corners[1, 0][1] < corners[0, 1][1] == corners[1, 1][1]
    for too_few in (prompts[:1], prompts[0]):
        with pytest.raises(ValueError, match="at least two prompts"):
            swap_sheet(pipe, too_few)
