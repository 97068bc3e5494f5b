"""Contact sheets and curves: sizes, contents, and refusal of nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sefi_fast.evaluation import Panel, contact_sheet, training_curves


def solid(colour: tuple[int, int, int], size=(48, 48)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_every_picture_of_every_row_is_on_the_sheet():
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200)]
    panels = [Panel(solid(colour), f"number {n}") for n, colour in enumerate(colours)]
    sheet = contact_sheet(
        [("first", panels[:3]), ("second", panels[3:])], title="a title", panel_size=96
    )
    pixels = np.asarray(sheet).reshape(-1, 3)
    for colour in colours:
        assert (pixels == colour).all(axis=1).sum() == 96 * 96


def test_proportions_are_kept():
    sheet = contact_sheet([("", [Panel(solid((9, 9, 200), (60, 30)))])], panel_size=120)
    pixels = (np.asarray(sheet) == (9, 9, 200)).all(axis=2)
    assert pixels.any(axis=1).sum() == 60 and pixels.any(axis=0).sum() == 120


def test_a_long_caption_widens_nothing_and_is_wrapped():
    short = contact_sheet([("", [Panel(solid((0, 0, 0)), "x")])])
    long = contact_sheet([("", [Panel(solid((0, 0, 0)), "many words in a caption " * 3)])])
    assert long.width == short.width and long.height > short.height


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="no images"):
        contact_sheet([("empty", [])])
    with pytest.raises(ValueError, match="empty history"):
        training_curves(SimpleNamespace(loss=[], subject_loss=[], seconds=[]))


def test_curves_show_both_series():
    rng = np.random.default_rng(0)
    history = SimpleNamespace(
        loss=list(rng.random(40) + 0.1), subject_loss=list(rng.random(40)), seconds=list(range(40))
    )
    picture = np.asarray(training_curves(history)).astype(int)
    reddish = (picture[..., 0] - picture[..., 2]) > 60
    bluish = (picture[..., 2] - picture[..., 0]) > 60
    width = picture.shape[1]
    assert bluish[:, : width // 2].sum() > 200 and reddish[:, width // 2 :].sum() > 200
