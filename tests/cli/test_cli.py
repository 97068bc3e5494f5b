"""The command line on the bundled model: what each subcommand leaves, errors in one line."""

from __future__ import annotations

import errno
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from sefi_fast import bundled_subject_image
from sefi_fast.cli import main
from sefi_fast.cli.demo import FILES, run_demo
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import SAMPLING
from sefi_fast.training import engine as engine_module

PICTURE = str(bundled_subject_image())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A subject file trained for two steps by the command."""
    folder = tmp_path_factory.mktemp("trained")
    file = folder / "me.safetensors"
    status = main(
        ["train", PICTURE, "-o", str(file), "--placeholder", "<me>", "--quiet",
         "--steps", "2", "--batch-size", "2", "--no-flip", "--stages", "3", "--snr-gamma", "none",
         "--validation-prompts", "a photo of a {} in the snow", "--validation-every", "2"]
    )  # fmt: skip
    assert status == 0
    return file


def test_train_leaves_the_subject_its_curves_and_its_validation(trained):
    subject = Subject.load(trained)
    assert (subject.placeholder, subject.class_word, subject.stages) == ("<me>", "creature", 3)
    assert subject.settings["flip"] is False and subject.settings["steps"] == 2
    assert subject.settings["snr_gamma"] is None
    for name in ("me-training.png", "me-validation.png"):
        assert np.asarray(Image.open(trained.with_name(name))).std() > 5


def test_train_leaves_a_run_file_that_starts_the_same_run(trained, tmp_path, capsys):
    run_file = trained.with_name("me.run.yaml")
    again = tmp_path / "again.safetensors"
    saved = tmp_path / "saved.json"
    command = ["train", "--config", str(run_file), "-o", str(again), "--quiet"]
    assert main([*command, "--save-config", str(saved), "--validation-every", "50"]) == 0
    first, second = Subject.load(trained), Subject.load(again)
    assert torch.equal(first.tokens[0], second.tokens[0])
    assert second.settings["validation_every"] == 50 and second.placeholder == "<me>"
    assert second.settings["snr_gamma"] is None
    settings = json.loads(saved.read_text())
    assert settings["output"] == str(again) and settings["stages"] == 3
    assert settings["image"].endswith("subject.png")
    assert not again.with_name("again.run.yaml").exists()


def test_train_takes_a_preset_and_options_before_it(tmp_path):
    file = tmp_path / "me.safetensors"
    command = ["train", PICTURE, "-o", str(file), "--quiet", "--steps", "1"]
    assert main([*command, "--preset", "prospect", "--stages", "2"]) == 0
    subject = Subject.load(file)
    assert (subject.stages, subject.split, subject.settings["weight_lambda"]) == (2, False, 0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_train_ended_by_a_signal_exits_with_its_number_and_is_resumed(
    tmp_path, capsys, monkeypatch, number
):
    file = tmp_path / "me.safetensors"
    command = ["train", PICTURE, "-o", str(file), "--quiet", "--steps", "4",
               "--batch-size", "1", "--stages", "2"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    handlers = {
        one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    for name in ("me.safetensors", "me.run.yaml", "me-training.png"):
        # As a kill in the middle of writing leaves them.
        (tmp_path / f".{name}.0123abcd").write_text("half")
    assert main([*command, "--resume"]) == 0
    assert Subject.load(file).summary["steps"] == 4
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["me-training.png", "me.run.yaml", "me.safetensors"]


def test_generate_writes_one_file_a_picture_and_seeds_decide(trained, tmp_path, capsys):
    command = ["generate", "a photo of a <me> on the beach", "-s", str(trained), "--steps", "3"]
    assert main([*command, "-n", "2", "--seed", "5", "-o", str(tmp_path / "a")]) == 0
    assert main([*command, "-n", "1", "--seed", "6", "-o", str(tmp_path / "b")]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00005.png", "00006.png"]
    assert "00006.png" in capsys.readouterr().out
    second = np.asarray(Image.open(tmp_path / "a" / "00006.png")).astype(int)
    alone = np.asarray(Image.open(tmp_path / "b" / "00006.png")).astype(int)
    first = np.asarray(Image.open(tmp_path / "a" / "00005.png")).astype(int)
    assert abs(second - alone).max() <= 2 and abs(first - second).max() > 20


def test_maps_draws_every_word(trained, tmp_path):
    file = tmp_path / "new" / "maps.png"
    arguments = ["maps", "a photo of a <me> with a hat", "-s", str(trained), "--steps", "2"]
    assert main([*arguments, "--words", "<me>", "hat", "-o", str(file)]) == 0
    assert Image.open(file).width > 3 * 256


def test_info_names_every_backend(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("triton", "cuda", "cpu", "eager", "torch", "diffusers"):
        assert name in printed


def test_demo_leaves_its_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SAMPLING, "steps", 2)
    assert main(["demo", "-o", str(tmp_path), "--steps", "2"]) == 0
    for name in ("sheet.png", "attention.png", "training.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5
    assert Subject.load(tmp_path / "subject.safetensors").placeholder == "<it>"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES.values())
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing.png"], "missing.png"),
        (["train"], "the image is missing"),
        (["train", "--config", "missing.yaml"], "no config file at missing.yaml"),
        (["train", PICTURE, "--preset", "best"], "'textual-inversion'"),
        (["train", PICTURE, "--resume"], "no checkpoint to go on from"),
        (["train", PICTURE, "--resume", "--resume-from", "auto"], "give one of them"),
        (["train", PICTURE, "--trackers", "tensorbord"], "no tracker 'tensorbord'"),
        (["train", PICTURE, "--schedule", "steep"], "'linear'"),
        (["train", PICTURE, "--placeholder", ""], "placeholder must be one word"),
        (["train", PICTURE, "--mask", PICTURE], "there is a mask, but attention_loss is"),
        (["train", PICTURE, "--attention-loss", "mask"], "there is no mask, but attention_loss"),
        (["generate", "a photo", "-s", "missing.safetensors"], "missing.safetensors"),
        (["generate", "a photo of a creature", "-n", "0"], "--number"),
        (["generate", "a photo", "-m", "no/such-folder-here/at-all"], "no/such-folder-here/at-all"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"sefi-fast {arguments[0]}:") and words in message
    assert list(tmp_path.iterdir()) == []


def test_generate_refuses_a_prompt_without_its_subject(trained, tmp_path, capsys):
    status = main(["generate", "a photo", "-s", str(trained), "-o", str(tmp_path / "out")])
    assert status == 1 and "<me>" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
