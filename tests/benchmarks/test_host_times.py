"""Times of the host: every contender that runs here, and those left out are left out."""

from __future__ import annotations

import csv
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
    with (tmp_path / "host_times.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {row["contender"] for row in rows}
    assert {"eager-maps", "sefi-cpu", "sdpa"} <= names
    assert "sdpa-math" not in names
    assert all(0 < float(row["seconds"]) < 1 for row in rows)


def test_the_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(host_times.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 0.25

    assert host_times.host_seconds(call, torch.device("cpu")) == 0.25
