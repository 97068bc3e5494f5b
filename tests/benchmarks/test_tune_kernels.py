"""The tuner: its candidates, dropped ones, the best one, and its printed lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import tune_kernels
from common.report import read_csv
from common.shapes import Problem
from common.timing import Effort, Timing
from sefi_fast.kernels import Device, KernelConfig
from sefi_fast.kernels.configs import WIDTHS
from sefi_fast.kernels.launch import CompiledLaunch
from tune_kernels import KERNELS, Best, Candidate, Slot

from sefi_fast.ops.dispatch import CudaDevice
from sefi_fast.ops.triton import interpreted

SLOT = Slot("forward", 90, "half", 80)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("precision", ["half", "single"])
def test_the_default_is_first_and_nothing_is_tried_twice(
    kernel: str, capability: int, precision: str
) -> None:
    slot = Slot(kernel, capability, precision, 80)
    if (default := tune_kernels.default_of(slot)) is None:
        assert kernel == "backward" and not tune_kernels.problems_of(slot, torch.bfloat16)
        return
    tried = tune_kernels.candidates(slot)
    configs = [candidate.config for candidate in tried]
    assert configs[0] == default and [one.default for one in tried].count(True) == 1
    assert len(configs) == len(set(configs)) > 10


def test_an_interrupted_run_keeps_its_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tune_kernels, "cuda_device", lambda index: CudaDevice(90, 132))
    monkeypatch.setattr("common.report.device_name", lambda device: "gpu")
    monkeypatch.setattr("common.report.environment", lambda device: {})
    seen: list[list[Candidate]] = []

    def measure(tried: list[Candidate], *_: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(tried)

    monkeypatch.setattr(tune_kernels, "measure_slot", measure)
    options = ["--kernels", "forward", "--widths", "48", "64", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        tune_kernels.tune(tune_kernels.parse(options))
    assert len(read_csv(tmp_path / "tune_kernels.csv")) == len(seen[0]) > 1


@pytest.mark.parametrize("capability", [90, 121])
def test_the_printed_lines_are_lines_of_the_table(capability: int) -> None:
    """A device without lines gets all widths."""
    slot, best = SLOT._replace(capability=capability), KernelConfig(32, 8, 2, kv_in_loop=True)
    code = "\n".join(tune_kernels.table_lines([Best(slot, best, "12 % faster")]))
    assert "        # 12 % faster\n        80: KernelConfig(32, 8, 2, kv_in_loop=True)," in code
    ((key, lines),) = eval(f"{{{code}}}", {"KernelConfig": KernelConfig}).items()
    assert key == ("forward", capability, "half") and lines[80] == best
    assert list(lines) == ([80] if capability == 90 else list(WIDTHS))
    if capability == 121:
        assert lines[64] == tune_kernels.default_of(slot._replace(width=64))


@pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter")
class TestOnTheInterpreter:
    """The interpreter is the device; times are made up."""

    problems = [Problem("custom", 40, 16, 1, 1, 20)]
    configs = (KernelConfig(16, 4, 1), KernelConfig(32, 4, 1), KernelConfig(64, 4, 1))

    def run(self, kernel: str, factors: list[float], spread: float = 0.01) -> Best | None:
        """Return the best by times in the order of the candidates; the second run repeats them."""
        slot = SLOT._replace(kernel=kernel)
        self.tried = [Candidate(slot, config, i == 0) for i, config in enumerate(self.configs)]
        fastest = [0.0]

        def time_calls(calls: dict[str, Any], _: Effort) -> dict[str, Timing]:
            if "best" in calls:
                seconds = {"default": factors[0], "best": fastest[0]}
            else:
                seconds = {name: factors[int(name)] for name in calls}
                fastest[0] = min(seconds.values())
            return {name: Timing(seconds[name], 1.0, spread, 9) for name in calls}

        device = Device(90, 2, True)
        return tune_kernels.measure_slot(
            self.tried, self.problems, torch.float32, device, time_calls
        )

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_a_right_and_faster_candidate_wins(self, kernel: str) -> None:
        best = self.run(kernel, [1.0, 0.8, 0.9])
        assert best is not None and best.config == self.configs[1]
        assert best.evidence.startswith("20% faster")
        assert [candidate.dropped for candidate in self.tried] == [None] * 3

    def test_a_gain_within_the_noise_is_none(self) -> None:
        assert self.run("forward", [1.0, 0.95, 1.0], spread=0.03) is None

    def test_a_wrong_and_a_failing_candidate_are_named_and_dropped(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plan = tune_kernels.Bench.plan

        def broken(bench: Any, config: KernelConfig) -> Any:
            planned = plan(bench, config)
            if config == self.configs[1]:
                # Half of the problem's rows are left out.
                launch = planned.launches[0]
                numbers = dict(launch.prepared.numbers)
                numbers["seqlen_q"] //= 2
                fewer = CompiledLaunch(launch.kernel, launch.prepared.grid, numbers, config)
                planned.launches[0] = launch._replace(prepared=fewer)
            if config == self.configs[2]:
                raise ValueError("out of resources")
            return planned

        monkeypatch.setattr(tune_kernels.Bench, "plan", broken)
        assert self.run("forward", [1.0, 0.1, 0.1]) is None
        assert self.tried[1].dropped is not None and "output is off" in self.tried[1].dropped
        assert self.tried[2].dropped == "does not run: ValueError: out of resources"
        assert "dropped: sm_90 forward" in capsys.readouterr().err
