"""Kernels by name and time: what the profiler says, put together."""

from __future__ import annotations

import kernel_times
import pytest
import torch
from _contenders import Contender, eager_maps
from _shapes import Problem


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("cross_attention_forward", "cross_attention_forward"),
        (
            "void sefi::cuda::tensor::(anonymous namespace)::query_kernel<40, "
            "sefi::cuda::BFloat16>(sefi::cuda::BackwardArguments)",
            "query_kernel<40>",
        ),
        (
            "sefi::cuda::subject_loss_kernel(sefi::cuda::SubjectLossArguments)",
            "subject_loss_kernel",
        ),
        (
            "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>"
            "(pytorch_flash::Flash_fwd_params)",
            "flash_fwd_kernel<64, 128>",
        ),
    ],
)
def test_a_kernel_is_called_by_its_own_name(name: str, short: str) -> None:
    assert kernel_times.short_name(name) == short


def test_runs_are_added_up_and_the_flush_is_left_out() -> None:
    events = [("a", 3.0), ("b", 1.0), ("a", 5.0), ("b", 1.0), ("Memset (Device)", 90.0)]
    events.append(("void at::native::vectorized_elementwise_kernel<FillFunctor<char>>", 80.0))
    found = kernel_times.by_kernel(events, calls=2)
    assert found == pytest.approx({"a": 4e-6, "b": 1e-6})


def test_of_each_stretch_the_second_call_counts() -> None:
    events = [(4.0 * turn + place, name, 10.0 * turn + place) for turn in range(2)
              for place, name in enumerate(["a", "b", "a", "b"])]  # fmt: skip
    events += [(-1.0, "Memset (Device)", 90.0), (3.5, "Memset (Device)", 90.0)]
    found = kernel_times.last_calls(reversed(events), calls=2)
    assert found == [("a", 2.0), ("b", 3.0), ("a", 12.0), ("b", 13.0)]


def test_rows_tell_the_longest_first_and_the_time_a_row() -> None:
    problem = Problem("sd15", 100, 40, 2, batch=5)
    contender = Contender("one", "sefi", True, eager_maps)
    rows = kernel_times.rows_of(problem, contender, {"short": 1e-6, "long": 4e-6})
    assert [row["kernel"] for row in rows] == ["long", "short"]
    assert rows[0]["picoseconds_a_row"] == pytest.approx(4e-6 / 1000 * 1e12)


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_times.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
