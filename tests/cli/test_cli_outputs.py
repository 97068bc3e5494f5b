"""What the commands write: told at once where it cannot be, and nothing that they read is lost."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from sefi_fast import bundled_subject_image
from sefi_fast.cli import main
from sefi_fast.cli.options import write_image
from sefi_fast.subject import Subject
from sefi_fast.utils.files import check_folder

PICTURE = bundled_subject_image()
QUICK = ["--quiet", "--steps", "1", "--batch-size", "1", "--stages", "1"]


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    """A photo of the user's in the current folder, me.png."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "me.png"
    path.write_bytes(PICTURE.read_bytes())
    return path


@pytest.fixture
def nothing_begins(monkeypatch):
    """What takes time fails the test that reaches it."""

    def begun(*arguments, **settings):
        raise AssertionError("the command began to work")

    for name in ("training.train", "pipelines.load_pipeline", "cli.demo.run_demo"):
        monkeypatch.setattr(f"sefi_fast.{name}", begun)


def test_a_photo_of_the_subjects_name_is_kept(photo, capsys):
    assert main(["train", "me.png", "-o", "me.safetensors", *QUICK]) == 0
    assert photo.read_bytes() == PICTURE.read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("me.safetensors: use it as <it>")
    assert lines[1] == "me-training.png: the loss"


def test_a_curve_that_cannot_be_saved_is_a_warning(photo, capsys, caplog):
    photo.with_name("me-training.png").mkdir()
    with caplog.at_level(logging.WARNING):
        assert main(["train", "me.png", "-o", "me.safetensors", *QUICK]) == 0
    assert "the loss could not be drawn to me-training.png" in caplog.text
    assert capsys.readouterr().out.splitlines() == ["me.safetensors: use it as <it> in a prompt"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("me-training.png", ["me-training.png", "-o", "me.safetensors"]),
        ("me-validation.png", ["me.png", "--mask", "me-validation.png", "-o", "me.safetensors"]),
        ("me.png", ["me.png", "--save-config", "./me.png"]),
        ("sd.safetensors", ["me.png", "-m", "sd.safetensors", "-o", "sd.safetensors"]),
        ("me.safetensors", ["me.safetensors", "-o", "../here/me.safetensors"]),
    ],
)
def test_train_overwrites_nothing_that_it_reads(
    photo, monkeypatch, nothing_begins, name, arguments, capsys
):
    folder = photo.parent / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for one in {"me.png", name}:
        (folder / one).write_bytes(b"mine")
    assert main(["train", *arguments]) == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"me.png", name}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "me.png", "-o", "pic.png"], "'pic.png' must end in .safetensors"),
        (["train", "me.png", "-o", ""], "must end in .safetensors"),
        (["train", "me.png", "--save-config", ""], "is a folder"),
        (["train", "me.png", "-o", "me.png/me.safetensors"], "it is a file, not a folder"),
        (["generate", "a", "-o", "me.png"], "output me.png is a file"),
        (["generate", "a", "-o", "me.png/new"], "choose another folder"),
        (["generate", "a", "-o", "links"], "leads nowhere"),
        (["generate", "a", "--image", "00002.png", "-o", "."], "00002.png would be overwritten"),
        (["maps", "a", "-w", "a", "-o", "maps.xyz"], "'maps.xyz' must end in .png or .jpg"),
        (["maps", "a", "-w", "a", "-o", "folder.png"], "output folder.png is a folder"),
        (["maps", "a", "-w", "a", "-o", "me.png/a.png"], "it is a file, not a folder"),
        (["maps", "a", "-w", "a", "--image", "me.png", "-o", "me.png"], "would be overwritten"),
        (["swap", "--sheet", "a", "b", "-o", "maps.xyz"], "'maps.xyz' must end in .png or .jpg"),
        (["swap", "--sheet", "a", "b", "--image", "me.png", "-o", "me.png"], "be overwritten"),
        (["swap", "--key-prompt", "a", "--value-prompt", "b", "-o", "me.png"], "me.png is a file"),
        (["demo", "-o", "me.png"], "output me.png is a file"),
        (["demo", "--image", "sheet.png", "-o", "."], "sheet.png would be overwritten"),
        (["import", "e.safetensors", "--class-word", "cat", "-o", "me.png"], ".safetensors"),
        (["import", "e.safetensors", "--class-word", "cat", "-o", "f.safetensors"], "a folder"),
        (["export", "e.safetensors", "-o", "f.safetensors"], "is a folder"),
    ],
)
def test_an_output_that_cannot_be_is_told_first(photo, nothing_begins, command, words, capsys):
    for folder in ("folder.png", "f.safetensors"):
        photo.with_name(folder).mkdir()
    photo.with_name("links").mkdir()
    (photo.with_name("links") / "00003.png").symlink_to("gone")
    before = sorted(photo.parent.rglob("*"))
    assert main(command) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"sefi-fast {command[0]}:") and words in message
    assert sorted(photo.parent.rglob("*")) == before


def test_export_does_not_overwrite_the_subject(tmp_path, capsys):
    file = tmp_path / "me.safetensors"
    Subject("<me>", "cat", [torch.ones(1, 1, 4)], [torch.ones(4)], base_model="none").save(file)
    before = file.read_bytes()
    assert main(["export", str(file), "-o", str(tmp_path / "." / file.name)]) == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path, name, kind):
    path = tmp_path / "new" / "folder" / name
    write_image(path, Image.new("RGB", (8, 8), "red"))
    assert Image.open(path).format == kind
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_a_folder_is_made_only_when_asked(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert check_folder(folder, make=False) == folder and not folder.parent.exists()
    assert check_folder(folder) == folder and folder.is_dir()
    assert list(folder.iterdir()) == []
