"""Times of the host: every contender that runs here, and those left out are left out."""

from __future__ import annotations

import json
from pathlib import Path

import host_times
import pytest
import torch


def test_each_contender_gets_a_time_and_one_left_out_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_times, "CALLS", 2)
    monkeypatch.setattr(host_times, "ROUNDS", 2)
    host_times.run(torch.device("cpu"), tmp_path, without=["sdpa-math"])
    report = json.loads((tmp_path / "host_times.json").read_text())
    names = {row["contender"] for row in report["results"]}
    assert {"eager-maps", "sefi-cpu", "sdpa"} <= names
    assert "sdpa-math" not in names
    assert all(0 < row["seconds"] < 1 for row in report["results"])


def test_the_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(host_times.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 0.25

    assert host_times.host_seconds(call, torch.device("cpu")) == 0.25
