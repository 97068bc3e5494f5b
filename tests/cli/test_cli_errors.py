"""How the command ends when memory is short or a signal comes: in one line, never a traceback."""

from __future__ import annotations

import pytest
import torch

from sefi_fast.cli import info, main


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: 46080000000 bytes"
        ),
        RuntimeError("could not create a primitive"),
        MemoryError(),
    ],
    ids=["CUDA", "CPU", "oneDNN", "Python"],
)
def test_too_little_memory_is_told_with_what_helps(monkeypatch, capsys, error):
    def fail(options):
        raise error

    monkeypatch.setattr(info, "_info", fail)
    assert main(["info"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "there is not enough memory" in said and "--batch-size" in said


def test_other_errors_of_the_runtime_are_not_hidden(monkeypatch):
    def fail(options):
        raise RuntimeError("a defect")

    monkeypatch.setattr(info, "_info", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["info"])


def test_an_interrupt_without_words_is_called_stopped(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "_info", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "sefi-fast info: stopped\n"
