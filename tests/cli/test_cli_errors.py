"""Every expected error of a command is one line, before anything is written."""

from __future__ import annotations

import pytest
import torch

from sefi_fast import bundled_subject_image
from sefi_fast.cli import info, main

IMAGE = str(bundled_subject_image())


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore"), 1, "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "there is not enough mem"),
        (RuntimeError("could not create a primitive"), 1, "--number"),
        (MemoryError(), 1, "there is not enough memory (MemoryError)"),
        (OSError("no such device"), 1, "info: no such device\n"),
        (KeyboardInterrupt(), 130, "info: stopped\n"),
    ],
    ids=repr,
)
def test_a_command_ends_in_one_line(monkeypatch, capsys, error, status, words):
    def fail(options):
        raise error

    monkeypatch.setattr(info, "_info", fail)
    assert main(["info"]) == status
    message = capsys.readouterr().err
    assert message.startswith("sefi-fast info: ") and message.count("\n") == 1 and words in message


def test_a_defect_is_not_hidden(monkeypatch):
    def fail(options):
        raise RuntimeError("a defect")

    monkeypatch.setattr(info, "_info", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["info"])


SWAP = ["swap", "--key-prompt", "a", "--value-prompt", "b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing.png"], "missing.png"),
        (["train"], "the image is missing"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", IMAGE, "--preset", "best"], "'textual-inversion'"),
        (["train", IMAGE, "--resume"], "checkpoint"),
        (["train", IMAGE, "--resume", "--resume-from", "auto"], "give one of them"),
        (["train", IMAGE, "--trackers", "tensorbord"], "tensorbord"),
        (["train", IMAGE, "--schedule", "steep"], "'linear'"),
        (["train", IMAGE, "--placeholder", ""], "placeholder must be one word"),
        (["train", IMAGE, "--mask", IMAGE], "attention_loss"),
        (["train", IMAGE, "--attention-loss", "mask"], "attention_loss"),
        (["generate", "a photo", "-s", "missing.safetensors"], "missing.safetensors"),
        (["generate", "a photo of a creature", "-n", "0"], "--number"),
        (["generate", "a photo", "-m", "no/such-folder-here/at-all"], "no/such-folder-here/at-all"),
        (["generate", "a", "--region", "b", "0,0,1"], "the box '0,0,1' must be four numbers"),
        (["generate", "a", "--controlnet", "x"], "--control-image 0 times"),
        (["generate", "a", "--mask", "x.png"], "give --image too"),
        (["generate", "a", "--strength", "0.5"], "give --image too"),
        (["generate", "a", "--image", "x.png", "--strength", "2"], "at most 1"),
        (["generate", "a", "--image", IMAGE, "--steps", "1"], "less than one"),
        (["generate", "a", "--width", "0"], "--width is 0"),
        (["generate", "a", "--width", "50"], "--width is 50 pixels: give a multiple of 8"),
        (["generate", "a", "--image", IMAGE, "--height", "100"], "--height is 100 pixels"),
        (["generate", "a", "--steps", "0"], "--steps is 0: give 1 or more"),
        (["generate", "a", "--steps", "1001"], "trained on 1000"),
        (["generate", "a", "--guidance", "nan"], "nan"),
        (["generate", "a", "--guidance", "inf"], "inf"),
        (["generate", "a", "--seed", "-1"], "-1"),
        (["generate", "a", "--seed", str(2**63 - 3)], str(2**63 - 3)),
        (["generate", "a", "--image", IMAGE, "--mask", IMAGE], "latents of 8 channels"),
        (["generate", "a", "--image", "missing.png"], "missing.png"),
        (["generate", "a", "--controlnet", "no/such", "--control-image", IMAGE], "no/such"),
        (["generate", "a", "--controlnet", IMAGE, "--control-image", IMAGE], "pickled"),
        (["maps", "a creature", "-w", "creature", "-n", "0"], "--number is 0"),
        (["swap"], "--key-prompt and --value-prompt, or --sheet"),
        (SWAP[:3], "--key-prompt and --value-prompt"),
        ([*SWAP, "--sheet", "a", "b"], "--sheet"),
        ([*SWAP, "-n", "0"], "--number is 0"),
        (["swap", "--sheet", "a"], "two or more"),
        (["swap", "--sheet", "a", "b", "-n", "2"], "leave --number out"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_options_that_cannot_be_used_are_refused(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"sefi-fast {arguments[0]}:") and words in message
    assert list(tmp_path.iterdir()) == []
