"""Trackers and the progress bar: neither ends a run."""

from __future__ import annotations

import importlib.util
import io
import os
import re

import numpy as np
import pytest
from accelerate import tracking
from PIL import Image
from training.shared import BUNDLED_IMAGE, QUICK

from sefi_fast.errors import TrainingError
from sefi_fast.training import History, train
from sefi_fast.training.monitor import Progress, Trackers, check_trackers, shows_colors, thumbnails

FAST = {**QUICK, "steps": 3}


class Notes(tracking.GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "notes"
    requires_logging_directory = True
    made: list[Notes] = []
    breaks_at = None

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.run_name, self.folder = run_name, logging_dir
        self.told, self.settings, self.ended = [], None, False
        Notes.made.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **kwargs):
        if step == self.breaks_at:
            raise OSError("the disk is full")
        self.told.append((step, values))

    def log_images(self, values, step=None, **kwargs):
        self.told.append((step, {name: len(drawn) for name, drawn in values.items()}))

    def finish(self):
        self.ended = True


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["notes"])
    monkeypatch.setattr(Notes, "made", [])
    return Notes


def test_a_tracker_gets_every_step_and_image(bundled, notes, tmp_path):
    subject = train(
        BUNDLED_IMAGE, model=bundled, output=tmp_path / "me.safetensors", trackers=("notes",),
        validation_prompts=("a {}",), validation_every=2, validation_steps=1,
        schedule="linear", learning_rate=3e-3, **FAST,
    )  # fmt: skip
    (tracker,) = notes.made
    assert (tracker.run_name, tracker.folder) == ("me", tmp_path / "logs")
    assert tracker.settings["steps"] == 3 and isinstance(tracker.settings["templates"], str)
    numbers = [(step, told) for step, told in tracker.told if "loss" in told]
    assert [step for step, _ in numbers] == [1, 2, 3]
    assert [told["loss"] for _, told in numbers] == subject.history.loss
    rates = [told["learning_rate"] for _, told in numbers]
    assert rates == pytest.approx([3e-3, 2e-3, 1e-3])
    assert (2, {"validation": 1}) in tracker.told
    assert tracker.ended


def test_a_tracker_that_breaks_goes_and_one_that_cannot_start_is_an_error(
    bundled, notes, tmp_path, monkeypatch, caplog
):
    def start(tracker):
        raise RuntimeError("not logged in")

    options = {"model": bundled, "trackers": ("notes",), "log_dir": str(tmp_path), **FAST}
    monkeypatch.setattr(notes, "breaks_at", 2)
    assert len(train(BUNDLED_IMAGE, **options).history.loss) == 3
    assert [step for step, _ in notes.made[0].told] == [1]
    assert "'notes' fails and is removed: the disk is full" in caplog.text
    monkeypatch.setattr(notes, "start", start)
    with pytest.raises(TrainingError, match="'notes' cannot start: not logged in"):
        train(BUNDLED_IMAGE, **options)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("wandb", TrainingError, "pip install w"), ("tensorbord", ValueError, "has .*tensorboard")],
)
def test_a_missing_package_is_an_error_before_the_model_is_loaded(
    monkeypatch, name, error, message
):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    # Anything asked of this model is another error.
    with pytest.raises(error, match=message):
        train(BUNDLED_IMAGE, model=object(), class_word="cat", trackers=(name,))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_reads_the_logged_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_trackers(("tensorboard",))
    trackers = Trackers(("tensorboard",), tmp_path, "<me>", {"steps": 2, "scene": None})
    for step in (1, 2):
        trackers.log({"loss": 0.5 / step}, step)
    image = Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8))
    trackers.log_images({"validation": [image, image]}, 2)
    trackers.close()
    assert os.listdir(tmp_path) == ["me"]
    events = EventAccumulator(str(tmp_path / "me"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    # The two images side by side.
    (drawn,) = events.Images("validation")
    assert (drawn.step, drawn.width, drawn.height) == (2, 16, 8)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_thumbnails_are_half_blocks_in_the_images_colors():
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 4, 4))
    lines = thumbnails([image, Image.new("L", (9, 9), 128)], side=4).splitlines()
    assert len(lines) == 2
    assert all(line.count("▀") == 4 + 1 + 4 for line in lines)
    colors = [re.findall(r"\[38;2;(\d+;\d+;\d+)m\x1b\[48;2;(\d+;\d+;\d+)m", x) for x in lines]
    assert colors[0][0] == ("255;0;0", "255;0;0") and colors[1][0] == ("0;0;255", "0;0;255")
    assert colors[0][5] == ("128;128;128", "128;128;128")


def test_only_terminals_that_say_so_have_colors(monkeypatch):
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert shows_colors(Terminal()) and not shows_colors(io.StringIO())
    monkeypatch.setenv("COLORTERM", "")
    assert not shows_colors(Terminal())


def test_the_bar_shows_images_and_means(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLORTERM", "24bit")
    histories = [History([1.0], [0.5], [0.1]), History([3.0], [1.5], [0.1]), History()]
    bar = Progress("two of three", 4, 1, True)
    bar.step(histories)
    bar.images([Image.new("RGB", (8, 8), (1, 2, 3))])
    bar.close()
    wanted = ("two of three", "2/4", "loss=2", "subject_loss=1", "subjects=2", "38;2;1;2;3")
    assert all(text in stream.getvalue() for text in wanted)
    silent = Terminal()
    monkeypatch.setattr("sys.stderr", silent)
    bar = Progress("none", 4, 0, False)
    bar.step(histories)
    bar.images([Image.new("RGB", (8, 8))])
    bar.close()
    assert silent.getvalue() == ""
