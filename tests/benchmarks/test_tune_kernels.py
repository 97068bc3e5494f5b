"""The tuner: what it tries, that it drops what is wrong, whom it names best, what it prints."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import _tuning  # noqa: E402
import _tuning_device as device_tuning  # noqa: E402
import tune_kernels  # noqa: E402
from _measure import Effort, Timing  # noqa: E402
from _shapes import Problem  # noqa: E402
from _tuning import Place, Trial, Winner  # noqa: E402
from sefi_fast.kernels import Device, KernelConfig, Launch  # noqa: E402
from sefi_fast.kernels.configs import WIDTHS  # noqa: E402
from sefi_fast.kernels.launch import CompiledLaunch  # noqa: E402

from sefi_fast.ops.triton import interpreted  # noqa: E402

PLACE = Place("forward", 90, "half", 80)


def trials(*configs: KernelConfig) -> list[Trial]:
    return [Trial(PLACE, config, i == 0) for i, config in enumerate(configs)]


def test_the_default_comes_first_and_nothing_twice() -> None:
    for kernel in _tuning.KERNELS:
        for capability in (80, 86, 90, 100):
            for precision in ("half", "single"):
                place = Place(kernel, capability, precision, 80)
                if (default := _tuning.default_of(place)) is None:
                    assert kernel == "backward" and not _tuning.problems_of(place, torch.bfloat16)
                    continue
                tried = _tuning.candidates(place)
                assert tried[0] == default
                assert len(tried) == len(set(tried)) > 10


def test_a_run_that_is_cut_short_keeps_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sefi_fast.ops import dispatch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(dispatch, "cuda_device", lambda index: dispatch.CudaDevice(90, 132))
    monkeypatch.setattr(tune_kernels, "environment", lambda device: {})
    seen: list[list[Trial]] = []

    def measure(tried: list[Trial], *_: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(tried)

    monkeypatch.setattr(device_tuning, "measure_place", measure)
    options = tune_kernels.parse(
        ["--kernels", "forward", "--widths", "48", "64", "--output", str(tmp_path)]
    )
    with pytest.raises(KeyboardInterrupt):
        tune_kernels.tune_device(options)
    with (tmp_path / "tune_kernels.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(seen[0]) > 1


def test_the_kernel_of_the_keys_and_warp_groups_look_up_wider_tiles() -> None:
    assert _tuning.table_width("forward", 80, torch.bfloat16, 40) == 48
    assert _tuning.table_width("forward", 90, torch.bfloat16, 40) == 64
    assert _tuning.table_width("backward_key_value", 80, torch.bfloat16, 40) == 64
    assert _tuning.table_width("backward_key_value", 90, torch.float32, 40) == 48


def test_the_layers_of_a_place_are_those_that_take_its_configuration() -> None:
    def found(kernel: str, width: int) -> list[Problem]:
        return _tuning.problems_of(Place(kernel, 90, "half", width), torch.bfloat16)

    for kernel in ("backward_key_value", "backward"):
        layers = found(kernel, 64)
        assert {(one.queries, one.head_dim) for one in layers} >= {(4096, 40), (1024, 64)}
        assert {problem.batch for problem in layers} == {1, 16}
    assert {problem.queries for problem in found("forward", 160)} == {64, 256}
    (stand_in, _) = found("forward", 256)
    assert (stand_in.model, stand_in.queries, stand_in.head_dim) == ("custom", 1024, 256)
    assert not found("backward", 160)


def test_printed_lines_are_a_piece_of_the_table() -> None:
    best = KernelConfig(32, 8, 2, kv_in_loop=True)
    code = "\n".join(_tuning.table_lines([Winner(PLACE, best, "12 % faster")]))
    assert "        # 12 % faster\n        80: KernelConfig(32, 8, 2, kv_in_loop=True)," in code
    table = eval(f"{{{code}}}", {"KernelConfig": KernelConfig})
    assert table == {("forward", 90, "half"): {80: best}}


def test_a_device_without_lines_gets_all_its_widths() -> None:
    best = KernelConfig(32, 8, 2, kv_in_loop=True)
    place = PLACE._replace(capability=121)
    code = "\n".join(_tuning.table_lines([Winner(place, best, "12 % faster")]))
    (lines,) = eval(f"{{{code}}}", {"KernelConfig": KernelConfig}).values()
    assert list(lines) == list(WIDTHS) and lines[80] == best
    assert lines[64] == _tuning.default_of(place._replace(width=64))


def test_a_compiled_configuration_tells_how_many_programs_are_resident() -> None:
    device = device_tuning.Planned([SimpleNamespace(**launch(200, 30_000))], {})  # type: ignore[list-item]
    assert device.resident(90) == 2
    device = device_tuning.Planned([SimpleNamespace(**launch(168, 30_000))], {})  # type: ignore[list-item]
    assert device.resident(90) == 3 and device.resident(77) is None


def launch(registers: int, shared: int) -> dict[str, Any]:
    compiled = SimpleNamespace(n_regs=registers, metadata=SimpleNamespace(shared=shared))
    prepared = SimpleNamespace(compiled=compiled)
    return {"prepared": prepared, "config": KernelConfig(64, 4, 1)}


@pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter")
class TestOnTheInterpreter:
    """The device's part, with the interpreter as the device and made-up times."""

    problems = [Problem("custom", 40, 16, 1, 1, 20)]

    def test_all_launches_of_all_configurations_are_compiled(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiled: list[tuple[str, KernelConfig]] = []

        def compile_launch(launch: Launch) -> None:
            compiled.append((launch.kernel.fn.__name__, launch.config))
            if launch.config.block_m == 16:
                raise RuntimeError("too little shared memory")

        monkeypatch.setattr(Launch, "compile", compile_launch)
        configs = [KernelConfig(16, 4, 1), KernelConfig(32, 4, 1, split_dk_dv=True)]
        device = Device(90, 2, True)
        device_tuning.compile_configs(
            self.problems[0], "float32", device, "backward_key_value", configs
        )
        keys = [config for name, config in compiled if name.endswith("dkdv")]
        assert keys == [configs[0], configs[1], configs[1]]

    configs = (KernelConfig(16, 4, 1), KernelConfig(32, 4, 1), KernelConfig(64, 4, 1))

    def run(self, kernel: str, factors: list[float], spread: float = 0.01) -> Any:
        """measure_place with times by the place of a candidate; the second run tells the same."""
        tried = trials(*self.configs)
        for trial in tried:
            trial.place = PLACE._replace(kernel=kernel)
        self.tried, self.ticks = tried, 0

        def tick(_: Trial) -> None:
            self.ticks += 1

        def time_calls(calls: dict[str, Any], _: Effort) -> dict[str, Timing]:
            best = (
                min(factors[int(name)] for name in calls if name.isdigit()) if "0" in calls else 0
            )
            self.best = best or self.best
            seconds = {"default": factors[0], "best": self.best}
            return {
                name: Timing(seconds.get(name) or factors[int(name)], 1.0, spread, 9)
                for name in calls
            }

        device = Device(90, 2, True)
        return device_tuning.measure_place(
            tried, self.problems, torch.float32, device, tick, time_calls
        )

    @pytest.mark.parametrize("kernel", _tuning.KERNELS)
    def test_a_right_and_faster_candidate_wins(self, kernel: str) -> None:
        winner = self.run(kernel, [1.0, 0.8, 0.9])
        assert winner.config == self.configs[1]
        assert winner.evidence.startswith("20% faster")
        assert [trial.dropped for trial in self.tried] == [None] * 3
        assert self.ticks == 3

    def test_a_gain_within_the_noise_is_none(self) -> None:
        assert self.run("forward", [1.0, 0.95, 1.0], spread=0.03) is None

    def test_a_wrong_and_a_failing_candidate_are_named_and_dropped(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = device_tuning.Bench.plan

        def broken(bench: Any, config: KernelConfig | None) -> Any:
            planned = plan(bench, config)
            if config == self.configs[1]:
                # Half the rows of the problem are left out.
                launch = planned.launches[0]
                numbers = dict(launch.prepared.numbers)
                numbers["seqlen_q"] //= 2
                fewer = CompiledLaunch(launch.kernel, launch.prepared.grid, numbers, config)
                planned.launches[0] = launch._replace(prepared=fewer)
            if config == self.configs[2]:
                raise ValueError("out of resources")
            return planned

        monkeypatch.setattr(device_tuning.Bench, "plan", broken)
        assert self.run("forward", [1.0, 0.1, 0.1]) is None
        assert self.tried[1].dropped is not None and "output is off" in self.tried[1].dropped
        assert self.tried[2].dropped == "does not run: ValueError: out of resources"


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    assert tune_kernels.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
