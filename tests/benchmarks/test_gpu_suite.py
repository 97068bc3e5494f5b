"""The suite for a machine with a GPU: tests first, then benchmarks, then files to commit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_suite
import pytest
import torch
from common import report

JUNIT = """<testsuites><testsuite>
<testcase name="test_a[triton]"/>
<testcase name="test_b"><skipped message="not built"/></testcase>
<testcase name="test_c"><failure message="off by 2&#10;more"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("junit", "minutes", "status", "benchmarks"),
    [
        (JUNIT, 10, 1, 0),
        (JUNIT.replace("failure", "skipped"), 10, 0, len(gpu_suite.BENCHMARKS)),
        (JUNIT.replace("failure", "skipped"), 0, 0, 0),
    ],
    ids=["a test fails", "tests pass", "no time"],
)
def test_benchmarks_run_only_after_passing_tests(
    junit: str,
    minutes: float,
    status: int,
    benchmarks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran: list[str] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        if "pytest" in command:
            assert "gpu" in command
            Path(command[-2].partition("=")[2]).write_text(junit)
        else:
            assert Path(command[1]).exists()
            ran.append(Path(command[1]).stem)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite, "available_backends", dict)
    monkeypatch.setattr(gpu_suite, "device_name", lambda device: "gpu")
    monkeypatch.setattr(report, "device_name", lambda device: "gpu")
    monkeypatch.setattr(report, "environment", lambda device: {})
    arguments = ["--minutes", str(minutes), "--output", str(tmp_path)]
    assert gpu_suite.main(arguments) == status
    assert len(ran) == benchmarks
    rows = report.read_csv(tmp_path / "gpu_suite.csv")
    assert [row["name"] for row in rows] == ["test_a[triton]", "test_b", "test_c"]
    assert [row["status"] for row in rows] == ["pass", "skipped", "fail" if status else "skipped"]
    assert [row.get("detail") or "" for row in rows] == ["", "not built", "off by 2"]
    assert not list(tmp_path.glob("*.xml"))
    assert ("commit the files" in capsys.readouterr().out) == (status == 0)
