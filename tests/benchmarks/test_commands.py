"""Every benchmark refuses bad arguments, or a missing device, in one line."""

from __future__ import annotations

import importlib

import pytest
import torch


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("attn_bench", ["--device", "cpu", "--shapes", "sd9"], "sd9"),
        ("attn_bench", ["--device", "cpu", "--only", "nobody"], "nobody"),
        ("attn_bench", ["--device", "tpu"], "wanted"),
        ("attn_bench", ["--batches", "0"], "at least 1"),
        ("attn_bench", ["--plot-only", "nowhere"], "nowhere"),
        ("sample_bench", ["--model", "somewhere"], "--class-word"),
        ("step_bench", ["--device", "tpu"], "wanted"),
        ("gpu_suite", [], "no CUDA device"),
        ("kernel_bench", [], "no CUDA device"),
        ("tune_kernels", [], "no CUDA device"),
    ],
)
def test_a_command_that_cannot_run_says_so_in_one_line(
    name: str,
    arguments: list[str],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "tune_kernels":
        pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert importlib.import_module(name).main(arguments) == 2
    error = capsys.readouterr().err
    assert word in error and len(error.strip().splitlines()) == 1
