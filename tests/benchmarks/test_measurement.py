"""The float64 reference, the accuracy rule, the clock and the count of memory."""

from __future__ import annotations

import time

import pytest
import torch
from common import timing
from common.providers import EAGER, Workload
from common.reference import errors, float64_results, make_inputs, problem_with
from common.shapes import Problem
from common.timing import Effort, interleaved, interleaved_cuda, memory

from sefi_fast.ops import cpu

CPU = torch.device("cpu")
PROBLEM = Problem("custom", queries=37, head_dim=24, heads=3, batch=2, keys=19)


def test_the_hand_written_reference_is_autograd_of_the_plain_form() -> None:
    inputs = make_inputs(PROBLEM, CPU, torch.float32)
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in inputs[:3])
    attention = torch.softmax(query @ key.mT * inputs.scale, -1)
    with torch.no_grad():
        reference = torch.softmax(query @ inputs.reference_key.double().mT * inputs.scale, -1)
    subject_loss = (attention - reference).square().sum((2, 3)).mean(1)
    output = attention @ value
    gradients = torch.autograd.grad(
        (output, subject_loss),
        (query, key, value),
        (inputs.grad_output.double(), inputs.grad_subject_loss.double()),
    )
    found = float64_results(inputs)
    for mine, theirs in zip(found, (output, subject_loss, *gradients), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-10, atol=1e-12)


def test_inputs_are_views_with_heads_side_by_side() -> None:
    inputs = make_inputs(PROBLEM, CPU, torch.bfloat16)
    assert inputs.query.stride() == (37 * 72, 24, 72, 1)
    assert inputs.reference_key.shape[0] == 1
    assert inputs.reference_key.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_right_and_a_lost_factor_is_wrong(dtype: torch.dtype) -> None:
    inputs = make_inputs(PROBLEM, CPU, dtype)
    wanted = float64_results(inputs)
    eager = Workload(EAGER, inputs)
    found = errors(eager.results(), wanted)
    assert problem_with(found, found, dtype, strict=True) is None
    assert problem_with(found, found, dtype, strict=False) is None
    off = eager.results()._replace(grad_key=eager.results().grad_key * 1.1)
    for strict in (True, False):
        assert "grad_key" in (problem_with(errors(off, wanted), found, dtype, strict) or "")


def test_nan_and_a_wrong_shape_never_pass() -> None:
    inputs = make_inputs(PROBLEM, CPU, torch.float32)
    wanted = float64_results(inputs)
    results = Workload(EAGER, inputs).results()
    poisoned = results.output.clone()
    poisoned[1, 2, 3, 4] = float("nan")
    for output in (poisoned, results.output[:1]):
        found = errors(results._replace(output=output), wanted)
        assert found["output"] == float("inf")
        assert problem_with(found, dict.fromkeys(found, 1.0), torch.float32, strict=False)


def test_calls_alternate_and_the_slower_call_is_slower() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    times = interleaved(
        {"slow": lambda: call("slow", 0.004), "fast": lambda: call("fast", 0.001)},
        Effort(seconds=0.05, block=0.0, rounds=4),
    )
    assert 0.004 <= times["slow"].fastest <= times["slow"].median
    assert times["fast"].median < times["slow"].median
    assert times["slow"].rounds == times["fast"].rounds >= 4
    # Two warm-up calls each, then rounds whose first call alternates.
    assert order[4:8] == ["slow", "fast", "fast", "slow"]


def test_events_time_each_call_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1 << 10)
    calls = {"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}
    times = interleaved_cuda(calls, Effort(0.02, 0.0, 4), flush_device="cpu")
    assert times["slow"].rounds == times["fast"].rounds >= 4
    assert 0.004 <= times["slow"].fastest < 0.04
    assert 0.001 <= times["fast"].fastest < times["slow"].fastest


def test_memory_counts_what_lives_at_once_and_leaves_out_the_results() -> None:
    mebibyte = 1 << 18

    def call() -> torch.Tensor:
        first = torch.ones(2 * mebibyte)
        second = torch.ones(3 * mebibyte)
        del first
        third = torch.ones(mebibyte)
        del second, third
        return torch.ones(4 * mebibyte)

    found = memory(call, CPU)
    assert found.peak == 5 << 20
    assert found.extra == 1 << 20


def test_the_native_core_s_own_scratch_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def forward(self, size: int) -> int:
            return size

    monkeypatch.setattr(cpu, "_C", Core())

    def call() -> torch.Tensor:
        cpu._C.forward(1 << 20)
        cpu._C.forward(3 << 20)
        return torch.ones(1 << 18)

    found = memory(call, CPU)
    assert found.peak == 4 << 20
    assert found.extra == 3 << 20
    assert isinstance(cpu._C, Core)
