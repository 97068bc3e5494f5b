"""Outputs of the commands are checked first, and no input is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sefi_fast import bundled_subject_image
from sefi_fast.cli import main
from sefi_fast.cli.options import write_image
from sefi_fast.subject import Subject

QUICK = ["--quiet", "--steps", "1", "--batch-size", "1", "--stages", "1"]
IMAGE = bundled_subject_image()
IMPORT = ["import", "e.safetensors", "--class-word", "cat"]
SWAP = ["swap", "--key-prompt", "a", "--value-prompt", "b"]


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    """A photo of the user in the current folder, me.png."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "me.png"
    path.write_bytes(IMAGE.read_bytes())
    return path


@pytest.fixture
def nothing_loads(monkeypatch):
    """Loading a model fails the test."""

    def load(*arguments, **settings):
        raise AssertionError("the command loads a model")

    for name in ("pipelines.load_pipeline", "training.base_model.load_pipeline"):
        monkeypatch.setattr(f"sefi_fast.{name}", load)


@pytest.mark.parametrize("is_blocked", [False, True])
def test_train_keeps_a_photo_of_the_subjects_name(photo, capsys, caplog, is_blocked):
    if is_blocked:
        photo.with_name("me-training.png").mkdir()
    assert main(["train", "me.png", "-o", "me.safetensors", *QUICK]) == 0
    assert photo.read_bytes() == IMAGE.read_bytes()
    curves = [] if is_blocked else ["me-training.png: the loss"]
    expected = ["me.safetensors: use it as <it> in a prompt", *curves]
    assert capsys.readouterr().out.splitlines() == expected
    assert ("the loss could not be saved to me-training.png" in caplog.text) == is_blocked


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
    photo, monkeypatch, nothing_loads, name, arguments, capsys
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
        ([*SWAP, "-o", "me.png"], "me.png is a file"),
        (["demo", "-o", "me.png"], "output me.png is a file"),
        (["demo", "--image", "sheet.png", "-o", "."], "sheet.png would be overwritten"),
        ([*IMPORT, "-o", "me.png"], ".safetensors"),
        ([*IMPORT, "-o", "f.safetensors"], "a folder"),
        ([*IMPORT, "-o", "e.safetensors"], "would be overwritten"),
        (["export", "e.safetensors", "-o", "f.safetensors"], "is a folder"),
        (["export", "e.safetensors", "-o", "e.pt"], "must end in .safetensors"),
        (["export", "e.safetensors", "-o", "./e.safetensors"], "would be overwritten"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(
    photo, nothing_loads, command, words, capsys
):
    for folder in ("folder.png", "f.safetensors", "links"):
        photo.with_name(folder).mkdir()
    (photo.with_name("links") / "00003.png").symlink_to("gone")
    subject = Subject("<me>", "cat", [torch.ones(1, 1, 4)], [torch.ones(4)], base_model="none")
    subject.save("e.safetensors")
    before = {p: p.is_file() and p.read_bytes() for p in photo.parent.rglob("*")}
    assert main(command) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"sefi-fast {command[0]}:") and words in message
    assert {p: p.is_file() and p.read_bytes() for p in photo.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_an_image_is_written_in_the_format_of_its_name(tmp_path, name, kind):
    path = tmp_path / "new" / "folder" / name
    write_image(path, Image.new("RGB", (8, 8), "red"))
    assert Image.open(path).format == kind
    assert [entry.name for entry in path.parent.iterdir()] == [name]
