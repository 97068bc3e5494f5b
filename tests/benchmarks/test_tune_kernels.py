"""The tuner: what it tries, that it drops what is wrong, whom it names best, what it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import _tuning  # noqa: E402
import _tuning_device as device_tuning  # noqa: E402
import tune_kernels  # noqa: E402
from _compiled import Choice, Facts  # noqa: E402
from _measure import Effort, Timing  # noqa: E402
from _shapes import Problem  # noqa: E402
from _tuning import Place, Trial, Winner  # noqa: E402
from _tuning_static import judge, static_winner  # noqa: E402
from sefi_fast.kernels import Device, KernelConfig, Launch  # noqa: E402
from sefi_fast.kernels.configs import TABLE  # noqa: E402
from sefi_fast.kernels.launch import Prepared  # noqa: E402

from sefi_fast.ops.triton import interpreted  # noqa: E402

PLACE = Place("forward", 90, "half", 80, "many")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def trials(*configs: KernelConfig) -> list[Trial]:
    return [Trial(PLACE, config, i == 0) for i, config in enumerate(configs)]


def test_the_default_comes_first_and_nothing_twice() -> None:
    for kernel in _tuning.KERNELS:
        for capability in (80, 86, 90, 100):
            for precision in ("half", "single"):
                place = Place(kernel, capability, precision, 80, "few")
                if (default := _tuning.default_of(place)) is None:
                    assert kernel == "backward" and not _tuning.problems_of(place, torch.bfloat16)
                    continue
                tried = _tuning.candidates(place)
                assert tried[0] == default
                assert len(tried) == len(set(tried)) > 10


def ranked(config: KernelConfig, cost: float, spills: int = 0, dropped: str | None = None) -> dict:
    figures = {"cost": cost, "spill_bytes": spills, "dropped": dropped}
    return {**PLACE._asdict(), "config": config._asdict(), **figures}


def test_the_best_of_a_static_run_are_tried_and_the_default() -> None:
    configs = [KernelConfig(block, 4, 1) for block in (16, 32, 64, 128, 256)]
    tried = trials(*configs)
    costs = [50.0, 40.0, 10.0, 20.0, 30.0]
    told = [ranked(config, cost) for config, cost in zip(configs, costs, strict=True)]
    told[1]["spill_bytes"] = 40
    told[2]["spill_bytes"] = 80
    told[3]["dropped"] = "does not compile"
    assert [t.config.block for t in _tuning.among(tried, told, 2)] == [16, 256, 32]
    assert [t.default for t in _tuning.among(tried, told, 2)] == [True, False, False]
    few = [Trial(PLACE._replace(bucket="few"), t.config, t.default) for t in tried]
    assert [t.config.block for t in _tuning.among(few, told, 1)] == [16, 256]
    elsewhere = [Trial(PLACE._replace(width=64), t.config, t.default) for t in tried]
    assert _tuning.among(elsewhere, told, 2) == elsewhere


def test_a_run_that_is_cut_short_keeps_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sefi_fast.ops import devices

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(devices, "cuda_device", lambda index: devices.CudaDevice(90, 132))
    monkeypatch.setattr(tune_kernels, "environment", lambda device: {})
    seen: list[list[Trial]] = []

    def measure(tried: list[Trial], *_: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(tried)

    monkeypatch.setattr(device_tuning, "measure_place", measure)
    file = tmp_path / "tried.json"
    options = tune_kernels.parse(
        ["--kernels", "forward", "--widths", "48", "64", "--json", str(file)]
    )
    with pytest.raises(KeyboardInterrupt):
        tune_kernels.tune_device(options)
    report = json.loads(file.read_text())
    assert len(report["trials"]) == len(seen[0]) > 1 and report["measured"]


def test_static_runs_rank_everything_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune_kernels.parse(["--static", "--among", "some.json"])
    assert "--among goes with a device" in capsys.readouterr().err


def test_the_kernel_of_the_keys_and_warp_groups_look_up_wider_tiles() -> None:
    assert _tuning.table_width("forward", 80, torch.bfloat16, 40) == 48
    assert _tuning.table_width("forward", 90, torch.bfloat16, 40) == 64
    assert _tuning.table_width("backward_key_value", 80, torch.bfloat16, 40) == 64
    assert _tuning.table_width("backward_key_value", 90, torch.float32, 40) == 48


def test_the_layers_of_a_place_are_those_that_take_its_configuration() -> None:
    def found(kernel: str, width: int, bucket: str) -> list[Problem]:
        return _tuning.problems_of(Place(kernel, 90, "half", width, bucket), torch.bfloat16)

    for kernel in ("backward_key_value", "backward"):
        many = found(kernel, 64, "many")
        assert {(one.queries, one.head_dim) for one in many} >= {(4096, 40), (1024, 64)}
        assert {problem.batch for problem in many} == {1, 16}
    few = found("forward", 160, "few")
    assert {problem.queries for problem in few} == {64, 256}
    (stand_in, _) = found("forward", 80, "few")
    assert (stand_in.model, stand_in.queries, stand_in.head_dim) == ("custom", 256, 80)
    assert not found("backward", 160, "many")


def test_printed_lines_are_a_piece_of_the_table() -> None:
    best = KernelConfig(32, 8, 2, reload=True)
    few = PLACE._replace(bucket="few")
    code = "\n".join(_tuning.table_lines([Winner(few, best, "12 % faster")]))
    kept = _tuning.as_code(TABLE["forward", 90, "half"][80]["many"])
    assert f"(80, {kept}, KernelConfig(32, 8, 2, reload=True))," in code
    assert "# few: 12 % faster" in code
    from sefi_fast.kernels.configs import _lines

    table = eval(f"{{{code}}}", {"_lines": _lines, "KernelConfig": KernelConfig})
    assert table["forward", 90, "half"][80] == {
        "many": TABLE["forward", 90, "half"][80]["many"],
        "few": best,
    }


def test_both_buckets_alike_are_one_configuration() -> None:
    best = KernelConfig(32, 8, 2)
    both = [Winner(PLACE._replace(bucket=bucket), best, "why") for bucket in _tuning.BUCKETS]
    assert list(_tuning.table_lines(both))[1:3] == [
        "        # why",
        "        (80, KernelConfig(32, 8, 2)),",
    ]


def facts(picoseconds: float, spills: int = 0, warps: int = 8, blocks: int = 1) -> Facts:
    bounds = {"H200": {"picoseconds": picoseconds, "unit": "issue", "parts": {}}}
    return Facts(
        choice=Choice("forward", 90, "bfloat16", 80, 4096), block=64, warps=4, stages=1,
        registers=100, spill_bytes=spills, shared_bytes=1, blocks_resident=blocks,
        warps_resident=warps, occupancy_limit="registers", matrix_instructions=1,
        warp_group_instructions=1, local_accesses_a_turn=0, load_widths={}, row_access_bytes={},
        bytes_a_row=1.0, exponentials_a_row=1.0, special_a_row=1.0, matrix_flops_a_row=1.0,
        instructions_a_row=1.0, bounds=bounds,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("default", "other", "wins"),
    [
        (facts(100.0), facts(90.0), True),
        (facts(100.0), facts(99.0), False),
        (facts(100.0), facts(50.0, spills=8), False),
        (facts(100.0, spills=8), facts(150.0), True),
        (facts(100.0), facts(90.0, warps=4), False),
        (facts(100.0), facts(10.0, blocks=0), False),
    ],
)
def test_no_spills_first_then_the_bound_with_enough_warps(
    default: Facts, other: Facts, wins: bool
) -> None:
    pair = trials(KernelConfig(64, 4, 1), KernelConfig(32, 4, 1))
    for trial, found in zip(pair, (default, other), strict=True):
        judge(trial, [found])
    winner = static_winner(pair)
    assert (winner is not None) == wins
    if winner:
        assert winner.config == pair[1].config and "static, not measured" in winner.evidence


def test_what_is_resident_is_known_once_it_is_compiled_and_the_default_keeps_its_own() -> None:
    for default in (True, False):
        trial = Trial(PLACE, KernelConfig(64, 4, 1, resident=2), default)
        judge(trial, [facts(60.0, blocks=4), facts(60.0, blocks=3)])
        assert trial.config.resident == (2 if default else 3)
    device = device_tuning.Planned([SimpleNamespace(**launch(200, 30_000))], {})  # type: ignore[list-item]
    assert device.resident(90) == 2
    device = device_tuning.Planned([SimpleNamespace(**launch(168, 30_000))], {})  # type: ignore[list-item]
    assert device.resident(90) == 3 and device.resident(77) is None


def launch(registers: int, shared: int) -> dict[str, Any]:
    compiled = SimpleNamespace(n_regs=registers, metadata=SimpleNamespace(shared=shared))
    prepared = SimpleNamespace(compiled=compiled)
    return {"prepared": prepared, "config": KernelConfig(64, 4, 1)}


def test_two_launches_cost_what_both_take() -> None:
    (trial,) = trials(KernelConfig(64, 4, 1, separate=True))
    judge(trial, [facts(60.0), facts(50.0, warps=4)])
    assert trial.figures["cost"] == 60.0 + 2 * 50.0


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
            if launch.config.block == 16:
                raise RuntimeError("too little shared memory")

        monkeypatch.setattr(Launch, "compile", compile_launch)
        configs = [KernelConfig(16, 4, 1), KernelConfig(32, 4, 1, separate=True)]
        device = Device(90, 2, True)
        device_tuning.compile_configs(
            self.problems[0], "float32", device, "backward_key_value", configs
        )
        keys = [config for name, config in compiled if name.endswith("key_value")]
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
                numbers = {**launch.prepared.numbers, "rows": launch.prepared.numbers["rows"] // 2}
                fewer = Prepared(launch.kernel, launch.prepared.grid, numbers, config)
                planned.launches[0] = launch._replace(prepared=fewer)
            if config == self.configs[2]:
                raise ValueError("out of resources")
            return planned

        monkeypatch.setattr(device_tuning.Bench, "plan", broken)
        assert self.run("forward", [1.0, 0.1, 0.1]) is None
        assert self.tried[1].dropped is not None and "output is off" in self.tried[1].dropped
        assert self.tried[2].dropped == "does not run: ValueError: out of resources"


def test_without_a_device_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    assert tune_kernels.main([]) == 2
    assert "--static --arch 80 90" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune_kernels.parse(["--arch", "80"])


def test_a_static_run_compiles_ranks_and_writes_what_it_tried(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    if not Path(triton.__file__).with_name("backends").joinpath("nvidia", "bin", "ptxas").exists():
        pytest.skip("this Triton carries no ptxas")
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import _tuning, tune_kernels\n"
        "from sefi_fast.kernels import KernelConfig\n"
        "_tuning.candidates = lambda place: [KernelConfig(16, 8, 1), KernelConfig(64, 4, 1)]\n"
        "arguments = ['--static', '--arch', '90', '--kernels', 'forward', '--widths', '64']\n"
        "sys.exit(tune_kernels.main([*arguments, '--json', sys.argv[3]]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    output = tmp_path / "tried.json"
    done = subprocess.run(
        [sys.executable, "-c", code, str(BENCHMARKS), str(BENCHMARKS.parent), str(output)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\(64, KernelConfig\(64, 4, 1, resident=[34]\)\),", done.stdout)
    assert "static, not measured" in done.stdout
    report = json.loads(output.read_text())
    assert [trial["default"] for trial in report["trials"]] == [True, False]
    assert report["measured"] is False
    assert report["trials"][1]["launches"][0]["matrix_flops_a_row"] == 3 * 2 * 80 * 64
