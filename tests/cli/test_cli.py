"""`train`, `train-many`, `demo` and `info` on the bundled model."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sefi_fast import bundled_subject_image
from sefi_fast.cli import main
from sefi_fast.cli.demo import FILES, run_demo
from sefi_fast.evaluation import sheets
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import SAMPLING
from sefi_fast.training import engine as engine_module

IMAGE = str(bundled_subject_image())
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subject file of two steps of the command."""
    file = tmp_path_factory.mktemp("trained") / "me.safetensors"
    status = main(
        ["train", IMAGE, "-o", str(file), "--placeholder", "<me>", "--quiet",
         "--steps", "2", "--batch-size", "2", "--no-flip", "--stages", "3", "--snr-gamma", "none",
         "--validation-prompts", "a photo of a {} in the snow", "--validation-every", "2"]
    )  # fmt: skip
    assert status == 0
    return file


def test_train_saves_the_subject_its_curves_and_its_validation(trained):
    subject = Subject.load(trained)
    assert (subject.placeholder, subject.class_word, subject.stages) == ("<me>", "creature", 3)
    assert subject.settings["flip"] is False and subject.settings["steps"] == 2
    assert subject.settings["snr_gamma"] is None
    for name in ("me-training.png", "me-validation.png"):
        assert np.asarray(Image.open(trained.with_name(name))).std() > 5


def test_train_saves_a_run_file_that_starts_the_same_run(trained, tmp_path):
    again, saved = tmp_path / "again.safetensors", tmp_path / "saved.json"
    command = ["train", "--config", str(trained.with_name("me.run.yaml")), "-o", str(again)]
    command += ["--quiet", "--save-config", str(saved), "--validation-every", "50"]
    assert main(command) == 0
    first, second = Subject.load(trained), Subject.load(again)
    assert torch.equal(first.tokens[0], second.tokens[0])
    assert second.settings["validation_every"] == 50 and second.placeholder == "<me>"
    assert second.settings["snr_gamma"] is None
    settings = json.loads(saved.read_text())
    assert settings["output"] == str(again) and settings["stages"] == 3
    assert settings["image"].endswith("subject.png")
    assert not again.with_name("again.run.yaml").exists()


def test_train_takes_a_preset_and_options_over_it(tmp_path):
    file = tmp_path / "me.safetensors"
    command = ["train", IMAGE, "-o", str(file), "--quiet", "--steps", "1"]
    assert main([*command, "--preset", "prospect", "--stages", "2"]) == 0
    subject = Subject.load(file)
    assert (subject.stages, subject.split, subject.settings["weight_lambda"]) == (2, False, 0.0)


@pytest.mark.parametrize("number", SIGNALS)
def test_train_ended_by_a_signal_exits_with_its_number_and_resumes(
    tmp_path, capsys, monkeypatch, number
):
    command = ["train", IMAGE, "-o", "me.safetensors", "--quiet", "--steps", "4",
               "--batch-size", "1", "--stages", "2"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    handlers = {one: signal.getsignal(one) for one in SIGNALS}
    for one in SIGNALS:
        signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
    honest = engine_module.Engine.step

    def step(engine, *arguments):
        result = honest(engine, *arguments)
        if engine.state_dict()["step"] == 2:
            os.kill(os.getpid(), number)
        return result

    try:
        with monkeypatch.context() as patched:
            patched.setattr(engine_module.Engine, "step", step)
            assert main(command) == 128 + number
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
    assert "after 2 of 4 steps" in capsys.readouterr().err
    assert main(command) == 1
    assert "--resume" in capsys.readouterr().err
    files = ["me-training.png", "me.run.yaml", "me.safetensors"]
    for name in files:
        # As a kill during writing leaves them.
        (tmp_path / f".{name}.0123abcd").write_text("half")
    assert main([*command, "--resume"]) == 0
    assert Subject.load("me.safetensors").summary["steps"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == files


VALIDATION = ["--steps", "2", "--batch-size", "1", "--resolution", "32", "--quiet"]
VALIDATION += ["--validation-prompts", "a {} in the snow", "a {} at night"]
VALIDATION += ["--validation-every", "1", "--validation-steps", "1"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of two images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("anna", "rex")):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def test_train_many_saves_the_validation_sheet_that_train_saves(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train-many", str(photos), "-o", str(out), *VALIDATION]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 2 subjects trained",
        f"{out / 'validation'}: images of the validation prompts during training",
    ]
    assert sorted(os.listdir(out / "validation")) == ["anna.png", "rex.png"]
    alone = tmp_path / "alone.safetensors"
    command = ["train", str(photos / "anna.png"), "-o", str(alone), "--placeholder", "<anna>"]
    assert main([*command, *VALIDATION]) == 0
    one, many = (
        np.asarray(Image.open(path)).astype(int)
        for path in (alone.with_name("alone-validation.png"), out / "validation" / "anna.png")
    )
    assert one.shape == many.shape and np.abs(one - many).mean() < 1


def test_a_folder_that_is_its_own_manifest_is_read_twice_alike(photos, capsys):
    for words in ("2 subjects trained", "0 subjects trained, 2 existed already"):
        command = ["train-many", str(photos), "-o", str(photos), "-n", "1", *VALIDATION]
        assert main(command) == 0
        assert f"{photos}: {words}" in capsys.readouterr().out


def test_a_sheet_that_cannot_be_made_loses_no_subject(photos, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sheets, "contact_sheet", None)
    assert main(["train-many", str(photos), "-o", str(tmp_path), *VALIDATION]) == 0
    assert "the sheet of validation prompts of rex could not be saved" in caplog.text
    assert Subject.load(tmp_path / "rex.safetensors").placeholder == "<rex>"


def test_train_many_overwrites_no_image_that_it_reads(photos, capsys):
    inside = photos.rename(photos.with_name("validation"))
    before = {path.name: path.read_bytes() for path in inside.iterdir()}
    assert main(["train-many", str(inside), "-o", str(inside.parent), *VALIDATION]) == 1
    assert "anna.png would be overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in inside.iterdir()} == before


def test_info_names_every_backend(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("triton", "cuda", "cpu", "eager", "torch", "diffusers"):
        assert name in printed


def test_demo_saves_its_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SAMPLING, "steps", 2)
    assert main(["demo", "-o", str(tmp_path), "--steps", "2"]) == 0
    for name in ("sheet.png", "attention.png", "training.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5
    assert Subject.load(tmp_path / "subject.safetensors").placeholder == "<it>"
    assert sorted(os.listdir(tmp_path)) == sorted(FILES.values())
    assert json.loads((tmp_path / "demo.json").read_text())["settings"]["steps"] == 2
    assert "done in" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["training.png", "sheet.png", "attention.png", "demo.json"])
def test_the_demo_leaves_no_half_of_a_file(tmp_path, monkeypatch, name):
    def replace(source, target, honest=os.replace):
        if target.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        honest(source, target)

    monkeypatch.setitem(SAMPLING, "steps", 1)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / name).write_bytes(b"before")
    with pytest.raises(OSError, match="Input/output error"):
        run_demo(tmp_path, steps=1, progress=False)
    assert (tmp_path / name).read_bytes() == b"before"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
