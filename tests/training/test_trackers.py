"""Trackers: accelerate's, told of before training if they are missing, never the end of a run."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
from accelerate import tracking
from PIL import Image

import sefi_fast
from sefi_fast.errors import TrainingError
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training import train
from sefi_fast.training.monitor import Trackers, check_trackers

PICTURE = sefi_fast.bundled_subject_image()
FAST = {"class_word": CLASS_WORD, "batch_size": 1, "stages": 2, "steps": 3, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return sefi_fast.load_pipeline(None)


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


def test_a_tracker_hears_of_every_step_and_picture(pipe, notes, tmp_path):
    subject = train(
        PICTURE, model=pipe, output=tmp_path / "me.safetensors", trackers=("notes",),
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


def test_a_tracker_that_breaks_is_left_out_and_training_goes_on(
    pipe, notes, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(notes, "breaks_at", 2)
    subject = train(PICTURE, model=pipe, trackers=("notes",), log_dir=str(tmp_path), **FAST)
    assert len(subject.history.loss) == 3
    assert [step for step, _ in notes.made[0].told] == [1]
    assert "'notes' fails and is left out from here: the disk is full" in caplog.text


def test_a_tracker_that_cannot_start_is_told_before_training(pipe, notes, tmp_path, monkeypatch):
    def start(tracker):
        raise RuntimeError("not logged in")

    monkeypatch.setattr(notes, "start", start)
    with pytest.raises(TrainingError, match="'notes' cannot start: not logged in"):
        train(PICTURE, model=pipe, trackers=("notes",), log_dir=str(tmp_path), **FAST)


def test_a_missing_package_is_told_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])

    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"the model's {name} was touched")

    with pytest.raises(TrainingError, match="needs a package that is not installed: pip install w"):
        train(PICTURE, model=Untouchable(), class_word="cat", trackers=("wandb",))
    with pytest.raises(ValueError, match="no tracker 'tensorbord'; accelerate has .*tensorboard"):
        train(PICTURE, model=Untouchable(), class_word="cat", trackers=("tensorbord",))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_reads_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_trackers(("tensorboard",))
    trackers = Trackers(("tensorboard",), tmp_path, "<me>", {"steps": 2, "scene": None})
    for step in (1, 2):
        trackers.log({"loss": 0.5 / step}, step)
    picture = Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8))
    trackers.log_images({"validation": [picture, picture]}, 2)
    trackers.close()
    assert os.listdir(tmp_path) == ["me"]
    events = EventAccumulator(str(tmp_path / "me"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    # The two images side by side.
    (drawn,) = events.Images("validation")
    assert (drawn.step, drawn.width, drawn.height) == (2, 16, 8)
