"""`sefi-fast train-many`: images drawn while subjects train are left as `train` leaves them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sefi_fast.cli import main
from sefi_fast.evaluation import sheets
from sefi_fast.subject import Subject

OPTIONS = ["--steps", "2", "--batch-size", "1", "--resolution", "32", "--quiet"]
OPTIONS += ["--validation-prompts", "a {} in the snow", "a {} at night"]
OPTIONS += ["--validation-every", "1", "--validation-steps", "1"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of two images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("anna", "rex")):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def test_each_subject_has_a_sheet_of_its_validation_pictures(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train-many", str(photos), "-o", str(out), *OPTIONS]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"{out}: 2 subjects learnt",
        f"{out / 'validation'}: the validation prompts as training went on",
    ]
    found = sorted(path.name for path in (out / "validation").iterdir())
    assert found == ["anna.png", "rex.png"]
    alone = tmp_path / "alone.safetensors"
    command = ["train", str(photos / "anna.png"), "-o", str(alone), "--placeholder", "<anna>"]
    assert main([*command, *OPTIONS]) == 0
    one, many = (
        np.asarray(Image.open(path)).astype(int)
        for path in (alone.with_name("alone-validation.png"), out / "validation" / "anna.png")
    )
    assert one.shape == many.shape and np.abs(one - many).mean() < 1


def test_a_folder_that_is_its_own_manifest_is_read_as_before(photos, capsys):
    for learnt in ("2 subjects learnt", "0 subjects learnt, 2 were there already"):
        assert main(["train-many", str(photos), "-o", str(photos), *OPTIONS]) == 0
        assert f"{photos}: {learnt}" in capsys.readouterr().out


def test_a_sheet_that_cannot_be_drawn_loses_no_subject(photos, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sheets, "contact_sheet", None)
    with caplog.at_level(logging.WARNING):
        assert main(["train-many", str(photos), "-o", str(tmp_path), *OPTIONS]) == 0
    assert "the validation prompts of rex could not be drawn" in caplog.text
    assert Subject.load(tmp_path / "rex.safetensors").placeholder == "<rex>"


def test_no_picture_that_is_read_is_overwritten(photos, capsys):
    inside = photos.rename(photos.with_name("validation"))
    before = {path.name: path.read_bytes() for path in inside.iterdir()}
    assert main(["train-many", str(inside), "-o", str(inside.parent), *OPTIONS]) == 1
    assert "anna.png would be overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in inside.iterdir()} == before
