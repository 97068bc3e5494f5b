"""The float64 reference, the accuracy rule, the clock and the count of memory."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from common.options import exit_status
from common.providers import EAGER, Workload
from common.reference import errors, float64_results, make_inputs, problem_with
from common.shapes import Problem
from common.timing import Effort, interleaved, memory

CPU = torch.device("cpu")
PROBLEM = Problem("custom", queries=37, head_dim=24, heads=3, batch=2, keys=19)
SLEEPS = {"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}


def test_the_hand_written_reference_is_autograd_of_the_plain_form() -> None:
    inputs = make_inputs(PROBLEM, CPU, torch.float32)
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in inputs[:3])
    attention = torch.softmax(query @ key.mT * inputs.scale, -1)
    reference = torch.softmax(query.detach() @ inputs.reference_key.double().mT * inputs.scale, -1)
    outputs = (attention @ value, (attention - reference).square().sum((2, 3)).mean(1))
    upstream = (inputs.grad_output.double(), inputs.grad_subject_loss.double())
    gradients = torch.autograd.grad(outputs, (query, key, value), upstream)
    for mine, theirs in zip(float64_results(inputs), (*outputs, *gradients), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-10, atol=1e-12)


def test_inputs_are_views_of_all_heads_in_a_row() -> None:
    inputs = make_inputs(PROBLEM, CPU, torch.bfloat16)
    assert inputs.query.stride() == (37 * 72, 24, 72, 1)
    assert inputs.reference_key.shape[0] == 1
    assert inputs.reference_key.dtype == torch.bfloat16


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_rounding_passes(dtype: torch.dtype, strict: bool) -> None:
    inputs = make_inputs(PROBLEM, CPU, dtype)
    wanted = float64_results(inputs)
    results = Workload(EAGER, inputs).results()
    found = errors(results, wanted)
    assert problem_with(found, found, dtype, strict) is None
    poisoned = results.output.clone()
    poisoned[1, 2, 3, 4] = float("nan")
    for name, wrong in (
        ("grad_key", results.grad_key * 1.1),
        ("output", poisoned),
        ("output", results.output[:1]),
    ):
        off = errors(results._replace(**{name: wrong}), wanted)
        assert (problem_with(off, found, dtype, strict) or "").startswith(name)


def test_calls_alternate_and_the_slower_call_is_slower() -> None:
    order: list[str] = []
    calls = {
        name: lambda name=name, sleep=sleep: [order.append(name), sleep()]
        for name, sleep in SLEEPS.items()
    }
    times = interleaved(calls, Effort(seconds=0.05, block=0.0, rounds=4))
    assert 0.004 <= times["slow"].fastest <= times["slow"].median
    assert times["fast"].median < times["slow"].median
    assert times["slow"].rounds == times["fast"].rounds >= 4
    # Two warm-up calls each, then rounds whose first call alternates.
    assert order[4:8] == ["slow", "fast", "fast", "slow"]


def test_memory_counts_what_lives_at_once_without_the_results() -> None:
    mebibyte = 1 << 18

    def call() -> torch.Tensor:
        first = torch.ones(2 * mebibyte)
        second = torch.ones(3 * mebibyte)
        del first
        third = torch.ones(mebibyte)
        del second, third
        return torch.ones(4 * mebibyte)

    assert memory(call, CPU) == (5 << 20, 1 << 20)


@pytest.mark.parametrize(
    ("provider", "status", "wanted"),
    [("sefi", "pass", 0), ("sefi", "fail: off", 1), ("sefi", "not run: x", 0), ("flex", "fail", 0)],
)
def test_a_wrong_row_of_sefi_fast_fails_the_command(
    provider: str, status: str, wanted: int
) -> None:
    rows: list[dict[str, Any]] = [{"provider": provider, "status": status}, {"call": "load"}]
    assert exit_status("bench", lambda: {"results": rows}) == wanted
