"""The suite for a machine with a GPU, dry: the CPU's checks run and no GPU figure is claimed."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import _check_processes
import _feature_checks
import _gpu_checks
import gpu_suite
import pytest
import torch
from _contenders import Contender, eager_maps
from _reference import Inputs
from torch import Tensor

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    with (folder / "gpu_suite.csv").open() as file:
        checks = list(csv.DictReader(file))
    return json.loads((folder / "environment.json").read_text())["gpu_suite"], checks


def test_dry_run(tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--no-build", "--small", "--output", str(tmp_path)]) == 0
    report, checks = read(tmp_path)
    assert report["gpu"] is None
    assert report["note"] == gpu_suite.NO_GPU
    assert report["red"] == 0
    assert {check["dtype"] for check in checks} == {"bfloat16", "float16", "float32"}
    assert all(check["status"] == "passed" for check in checks)
    assert "sefi-eager" in {check["contender"] for check in checks}
    assert not (tmp_path / "attn_bench.csv").exists()
    assert gpu_suite.NO_GPU in capsys.readouterr().out


def test_a_red_check_is_told_and_fails(
    tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(inputs: Inputs) -> tuple[Tensor, Tensor]:
        output, subject_loss = eager_maps(inputs)
        return output * 1.05, subject_loss

    wrong = Contender("sefi-wrong", "sefi", True, off)
    monkeypatch.setattr(_gpu_checks, "sefi_contenders", lambda device: [wrong])
    assert gpu_suite.main(["--no-build", "--small", "--output", str(tmp_path)]) == 1
    report, checks = read(tmp_path)
    red = [check for check in checks if check["status"] == "failed"]
    assert "accuracy against float64" in {check["name"] for check in red}
    assert report["red"] == len(red) >= 3


def test_results_that_change_between_repeats_are_a_race() -> None:
    calls: list[None] = []

    def drifting(inputs: Inputs) -> tuple[Tensor, Tensor]:
        calls.append(None)
        output, subject_loss = eager_maps(inputs)
        return output + (1e-6 if len(calls) == 17 else 0.0), subject_loss

    check = _gpu_checks.races(
        Contender("drifting", "sefi", True, drifting), CPU, torch.float32, True
    )
    assert check.status == "failed"
    assert "repeat 16" in check.detail


def test_a_check_that_breaks_is_a_failure_not_a_crash() -> None:
    def breaks(inputs: Inputs) -> tuple[Tensor, Tensor]:
        raise RuntimeError("illegal address\ntrace")

    check = _gpu_checks.accuracy(
        Contender("broken", "sefi", True, breaks), CPU, torch.float32, True
    )
    assert (check.status, check.detail) == ("failed", "RuntimeError: illegal address")


def test_a_feature_that_is_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _feature_checks.wrong_feature("eager", CPU, torch.float32) is None
    results = _feature_checks._results

    def off(case, backend, *rest):  # type: ignore[no-untyped-def]
        found = results(case, "eager", *rest)
        if backend == "other" and case.reference_grad:
            found["grad_reference_key"] = found["grad_reference_key"] * 0.99
        return found

    monkeypatch.setattr(_feature_checks, "_results", off)
    wrong = _feature_checks.wrong_feature("other", CPU, torch.float32)
    assert wrong is not None
    assert wrong.startswith("gradient through the reference: grad_reference_key is off by 0.01")


def test_checks_in_processes_are_all_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every accuracy once, pieced together, and the repeats after it."""
    eager = [one for one in _gpu_checks.sefi_contenders(CPU) if one.name == "sefi-eager"]
    monkeypatch.setattr(_check_processes, "sefi_contenders", lambda device: eager)
    monkeypatch.setattr(_check_processes, "DTYPES", ("float32",))
    found = list(_check_processes.checks_apart(CPU, True))
    assert {check.status for check in found} == {"passed"}
    against = {(_gpu_checks.ACCURACY, "float32"), (_gpu_checks.FEATURES, "float32")}
    repeated = {(f"{_gpu_checks.REPEATS} bitwise repeats", dtype) for dtype in _gpu_checks.DTYPES}
    assert {(check.name, check.dtype) for check in found} == against | repeated
    assert len(found) == len(against) + len(repeated)


def test_a_process_that_ends_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    task = _check_processes.Task("sefi-eager", "float32", (0,))
    monkeypatch.setattr(_check_processes, "_run_task", _ends)
    check = _check_processes._checked(task, "cpu", True)
    assert (check.status, check.name) == ("failed", _gpu_checks.ACCURACY)
    assert "BrokenProcessPool" in check.detail
    monkeypatch.setattr(_check_processes, "_run_repeats", _ends)
    assert [one.status for one in _check_processes._repeated("sefi-eager", "cpu", True)] == [
        "failed"
    ]


def _ends(*_: object) -> None:
    os._exit(3)


def test_triton_is_compiled_in_more_pieces_than_the_others() -> None:
    for dtype in _gpu_checks.DTYPES:
        pieces = _check_processes._pieces("sefi-triton", dtype, 19)
        assert [place for piece in pieces for place in piece] == list(range(19))
        assert len(pieces) > 1 == len(_check_processes._pieces("sefi-cuda", dtype, 19))


def test_one_accuracy_fails_when_a_piece_of_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check_processes, "_pieces", lambda *_: [(0,), (1,)])

    def answer(task: _check_processes.Task, *_: object) -> _gpu_checks.Check:
        status = "failed" if task.places == (1,) else "passed"
        return _gpu_checks.Check("name", task.backend, task.dtype, status, str(task.places))

    monkeypatch.setattr(_check_processes, "_checked", answer)
    found = list(_check_processes._against_float64(["one"], "cpu", True))
    red = [check for check in found if check.status == "failed"]
    assert len(red) == len(_gpu_checks.DTYPES) and {check.detail for check in red} == {"(1,)"}
