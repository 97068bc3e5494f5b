"""Kernels by name and time from a profile, and times of the host."""

from __future__ import annotations

from pathlib import Path

import kernel_bench
import pytest
import torch
from common.report import read_csv
from common.shapes import Problem


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void sefi::cuda::tensor::(anonymous namespace)::query_kernel<40, "
            "sefi::cuda::BFloat16>(sefi::cuda::BackwardArguments)",
            "query_kernel<40>",
        ),
        (
            "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>"
            "(pytorch_flash::Flash_fwd_params)",
            "flash_fwd_kernel<64, 128>",
        ),
    ],
)
def test_names_are_short(name: str, short: str) -> None:
    assert kernel_bench.short_name(name) == short


def test_times_add_up_without_the_flush() -> None:
    events = [("a", 3.0), ("b", 1.0), ("a", 5.0), ("b", 1.0), ("Memset (Device)", 90.0)]
    events.append(("void at::native::vectorized_elementwise_kernel<FillFunctor<char>>", 80.0))
    found = kernel_bench.by_kernel(events, calls=2)
    assert found == pytest.approx({"a": 4e-6, "b": 1e-6})
    rows = kernel_bench.rows_of(Problem("sd15", 100, 40, 2, batch=5), "one", found, "all")
    assert [row["kernel"] for row in rows] == ["a", "b"]
    assert rows[0]["picoseconds_a_row"] == pytest.approx(4e-6 / 1000 * 1e12)


def test_the_second_call_of_each_stretch_counts() -> None:
    events = [(4.0 * turn + place, name, 10.0 * turn + place) for turn in range(2)
              for place, name in enumerate(["a", "b", "a", "b"])]  # fmt: skip
    events += [(-1.0, "Memset (Device)", 90.0), (3.5, "Memset (Device)", 90.0)]
    found = kernel_bench.last_calls(reversed(events), calls=2)
    assert found == [("a", 2.0), ("b", 3.0), ("a", 12.0), ("b", 13.0)]


def test_each_provider_gets_a_host_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_bench, "HOST_CALLS", 2)
    monkeypatch.setattr(kernel_bench, "HOST_ROUNDS", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_bench.main(["--host", "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "host_times.csv")
    assert {"eager-maps", "sefi-cpu", "sdpa"} <= {row["provider"] for row in rows}
    assert all(0 < row["seconds"] < 1 for row in rows)
