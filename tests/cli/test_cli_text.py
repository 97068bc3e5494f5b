"""The command prints any text on any terminal, and reads ~ in every path."""

from __future__ import annotations

import io
import json
import logging
import os
import sys

import pytest
import torch

from sefi_fast import bundled_subject_image
from sefi_fast.cli import main
from sefi_fast.subject import Subject

IMAGE = bundled_subject_image()
COMMANDS = ("train", "train-many", "generate", "maps", "swap", "export", "import", "evaluate")
ENCODINGS = ["cp1252", "cp1251", "cp437", "ascii"]
QUICK = ["--quiet", "--steps", "1", "--batch-size", "1", "--stages", "1"]
HOSTILE = "<\x1b[31m\x9b1m\u202eme>"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a home folder that holds an image and a hostile subject."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "home" / "me.png").write_bytes(IMAGE.read_bytes())
    subject = Subject(HOSTILE, "creature\x1b[2J", [torch.ones(2, 1, 4)], [torch.ones(4)], "none")
    subject.save("hostile.safetensors")
    return tmp_path / "here"


@pytest.fixture
def terminal(monkeypatch):
    """Run the command with streams of an encoding; return its status, output and errors."""

    def run(encoding, *arguments):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
        with monkeypatch.context() as patched:
            for name, stream in streams.items():
                patched.setattr(sys, name, stream)
            try:
                status = main([*map(str, arguments)])
            except SystemExit as ended:
                status = ended.code
            finally:
                for stream in streams.values():
                    stream.flush()
        return status, *(s.buffer.getvalue().decode(encoding) for s in streams.values())

    return run


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_in_every_encoding(terminal, encoding, command):
    status, out, errors = terminal(encoding, command, "--help")
    assert status == 0 and out.startswith("usage") and not errors


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_good_run_ends_well_in_every_encoding(terminal, place, encoding):
    arguments = ["train", "~/me.png", "--placeholder", "<猫>", "-o", "é猫.safetensors", *QUICK]
    status, out, errors = terminal(encoding, *arguments)
    assert status == 0 and r"use it as <\u732b>" in out and r"\u732b-training.png" in out
    assert (place / "é猫-training.png").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a", "-s", "hostile.safetensors"],
        ["generate", HOSTILE, "-s", "hostile.safetensors"],
        ["export", "hostile.safetensors", "-o", "e.safetensors"],
        ["export", "hostile.safetensors", "--mean-of-stages", "-o", "e.safetensors"],
        ["train", HOSTILE],
        ["train", "~/me.png", "--placeholder", f"{HOSTILE} b"],
        ["train", "~/me.png", "-c", "hostile.yaml"],
        ["train-many", "hostile.jsonl", "-o", "many"],
        ["train-many", "photos", "-o", "many", *QUICK],
        ["train", "~/me.png", f"--{HOSTILE}"],
        ["train", "~/me.png", "--steps", HOSTILE],
        ["train", "~/me.png", "--crop", HOSTILE],
        [HOSTILE],
        ["train", "~/me.png", "-o", "\udcff.png"],
        ["generate", "\udcff <a>"],
        ["generate", "x" * 400_000 + " <a>"],
        ["train", "~/me.png", "--class-word", "x" * 400_000, "-m", "~/none"],
        ["train", "~/me.png", "--class-word", "x " * 200_000],
        ["train", "x" * 400_000],
    ],
)
def test_nothing_printed_moves_the_terminal_or_fills_more_than_a_screen(
    terminal, place, monkeypatch, arguments
):
    quoted = json.dumps(HOSTILE)
    (place / "hostile.yaml").write_text(f"{quoted}: {quoted}\n")
    (place / "hostile.jsonl").write_text(json.dumps({HOSTILE: HOSTILE, "name": HOSTILE}))
    (place / "photos").mkdir()
    (place / "photos" / "\x9b1m\u202ea.png").write_bytes(b"no image")
    for logger in (logging.getLogger("sefi_fast"), logging.getLogger()):
        monkeypatch.setattr(logger, "handlers", [])
    status, out, errors = terminal("utf-8", *arguments)
    said = errors if status else out
    # Bars of other libraries end in a carriage return.
    lines = [line for line in said.splitlines() if "Loading" not in line and "\x1b[A" not in line]
    assert lines and not any(sign in "".join(lines) for sign in "\x1b\x9b\u202e\udcff")
    assert sum(map(len, lines)) < 6000


def test_a_home_folder_is_expanded_in_every_option(place, capsys):
    home = place.parent / "home"
    (place / "c.yaml").write_text("image: ~/me.png\noutput: ~/two.safetensors\n")
    assert main(["train", "~/me.png", "--output=~/me.safetensors", *QUICK]) == 0
    assert main(["train", "-c", "c.yaml", "--save-config=~/run.yaml", *QUICK]) == 0
    assert f"image: {home / 'me.png'}" in (home / "run.yaml").read_text()
    sampling = ["--steps", "1", "--width", "64", "--height", "64"]
    for named in ("-s", "<me>=~/me.safetensors"), ("-s=<me>=~/me.safetensors",):
        assert main(["generate", "a <me>", *named, "-n", "1", "-o", "~/images", *sampling]) == 0
    exported = ["export", "~/me.safetensors", "--mean-of-stages", "-o=~/e.safetensors"]
    assert main(exported) == 0
    assert main(["train-many", "~/missing", "-o", "~/many"]) == 1
    printed = capsys.readouterr()
    assert (
        str(home / "missing") in printed.err
        and "~" not in printed.out + printed.err.splitlines()[-1]
    )
    made = {"me.safetensors", "two.safetensors", "run.yaml", "images", "e.safetensors"}
    assert made <= set(os.listdir(home)) and not os.path.lexists("~")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "~/me.png", "-o"],
        ["train", "~/me.png", "--model-config"],
        ["generate", "a", "-m"],
        ["generate", "a", "--control-image", "~/me.png", "--controlnet"],
        ["generate", "a", "-s"],
    ],
)
def test_a_missing_home_folder_is_refused(place, capsys, arguments):
    assert main([*arguments, "~nosuchuser/me.safetensors"]) == 1
    assert ": The path ~nosuchuser/me.safetensors begins with" in capsys.readouterr().err
