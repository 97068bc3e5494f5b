"""Config files: what is saved is loaded, presets are bases, every mistake is one clear error."""

from __future__ import annotations

import os

import pytest

from sefi_fast.training import TrainConfig
from sefi_fast.training.config_file import read_settings, write_settings

UNUSUAL = TrainConfig(
    steps=7,
    learning_rate=1e-7,
    loss_resolutions=(8, 16),
    templates=("a {} é", "yes: {}"),
    ema_decay=0.5,
    trackers=("tensorboard",),
    max_seconds=3,
    flip=False,
)


@pytest.mark.parametrize("name", ["run.yaml", "run.yml", "run.json", "run"])
@pytest.mark.parametrize("config", [TrainConfig(), UNUSUAL], ids=["default", "unusual"])
def test_what_is_saved_is_loaded(tmp_path, name, config):
    path = tmp_path / "new" / name
    config.save(path)
    assert TrainConfig.load(path) == config
    assert os.listdir(path.parent) == [name]


def test_a_hand_written_file_may_leave_things_out_and_write_numbers_its_way(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# mine\nlearning_rate: 1e-3\nweight_lambda: 0\nflip: no\nimage: me.jpg\n")
    config = TrainConfig.load(path)
    assert (config.learning_rate, config.weight_lambda, config.flip) == (1e-3, 0, False)
    assert config.steps == TrainConfig().steps
    assert read_settings(path).run == {"image": "me.jpg"}


def test_fields_win_over_the_files_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("stages: 4\npreset: prospect\n")
    assert TrainConfig.load(path) == TrainConfig.preset("prospect", stages=4)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("step: 3", ValueError, r"unknown settings: step \(did you mean steps\?\); the settings"),
        ("imagge: x\nzzz: 1", ValueError, r"imagge \(did you mean image\?\), zzz; the"),
        ("steps: many", TypeError, "steps must be an integer, got 'many'"),
        ("learning_rate: fast", TypeError, "learning_rate must be a number, got 'fast'"),
        ("steps: -1", ValueError, "steps must be at least 1"),
        ("image: 3", ValueError, "image must be a string, got 3"),
        (
            "preset: best",
            ValueError,
            "preset must be one of 'sefi', 'likeness', 'textual-inversion'",
        ),
        ("- steps", ValueError, "line by line, as 'steps: 600', got list"),
        ("", ValueError, "line by line"),
        ("a: [1", ValueError, "is no YAML"),
        ("!!python/object/apply:os.getcwd []", ValueError, "is no YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, error, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        TrainConfig.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file at"):
        TrainConfig.load(tmp_path / "missing.yaml")
    with pytest.raises(OSError, match="cannot be read"):
        TrainConfig.load(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="is no text"):
        TrainConfig.load(tmp_path / "picture.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        TrainConfig().save(tmp_path / "file" / "run.yaml")
    with pytest.raises(OSError):
        write_settings(tmp_path, {"steps": 1})
    assert sorted(os.listdir(tmp_path)) == ["file", "picture.png"]
