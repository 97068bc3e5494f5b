"""Checks configurations against the default on a device, then times those that are right."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, NamedTuple

import torch
from _measure import Effort, Timing, interleaved_cuda
from _occupancy import LIMITS, occupancy
from _reference import Inputs as Tensors
from _reference import make_inputs
from _report import time_text
from _shapes import Problem
from _tuning import Trial, Winner
from torch import Tensor

if TYPE_CHECKING:
    from sefi_fast.kernels import Device, KernelConfig, Launch

LEAST_GAIN = 0.01
TRY = Effort(0.05, 0.02, 9)
AGAIN = Effort(0.5, 0.02, 25)
"""The best is timed once more against the default alone: the best of many is lucky as well."""

Time = Callable[[dict[str, Callable[[], None]], Effort], dict[str, Timing]]


class Planned(NamedTuple):
    """The launches of one configuration on one problem, and what they write."""

    launches: list[Launch]
    results: dict[str, Tensor]

    def run(self) -> None:
        for launch in self.launches:
            launch.run()

    def resident(self, capability: int) -> int | None:
        """Programs on a multiprocessor at once, as compiled; None where nothing tells."""
        compiled = self.launches[0].prepared.compiled
        if compiled is None or capability not in LIMITS:
            return None
        warps, shared = self.launches[0].config.num_warps, compiled.metadata.shared
        return occupancy(capability, compiled.n_regs, warps, shared).blocks


class Bench:
    """One kernel on one problem: the tensors that all configurations share."""

    def __init__(self, kernel: str, problem: Problem, dtype: torch.dtype, device: Device) -> None:
        from sefi_fast.kernels import empty_row_stats

        from sefi_fast.ops.types import AttentionInputs, OutputGrads

        self.kernel = kernel
        self.device = device
        place = torch.device("cpu" if device.interpreted else "cuda")
        tensors: Tensors = make_inputs(problem, place, dtype)
        self.scale = tensors.scale
        query, key, value = (tensor.detach() for tensor in tensors[:3])
        self.inputs = AttentionInputs(query, key, value, tensors.reference_key)
        self.gradients = OutputGrads(tensors.grad_output, tensors.grad_subject_loss, None)
        self.statistics = empty_row_stats(query)
        if kernel == "backward_key_value":
            self._query_launch(None, self.statistics, None).run()

    def _rows_like(self, like: Tensor) -> Tensor:
        """[B, rows, H, D] of NaN, so that what a kernel leaves out shows."""
        batch, heads, rows, head_dim = like.shape
        return like.new_full((batch, rows, heads, head_dim), math.nan)

    def _query_launch(
        self, grad_query: Tensor | None, statistics: Tensor, config: KernelConfig | None
    ) -> Launch:
        from sefi_fast.kernels import plan_backward_query

        return plan_backward_query(
            self.inputs, self.gradients, grad_query, statistics,
            self.scale, False, self.device, config,
        )  # fmt: skip

    def plan(self, config: KernelConfig | None) -> Planned:
        """The launches under `config`, or under the table's."""
        from sefi_fast.kernels import plan_backward_fused, plan_backward_key_value, plan_forward

        query, key = self.inputs.query, self.inputs.key
        if self.kernel == "forward":
            output = self._rows_like(query)
            launch, partials = plan_forward(
                self.inputs, output, None, self.scale, self.device, config
            )
            assert partials is not None
            partials.fill_(math.nan)
            return Planned([launch], {"output": output, "subject_loss": partials})
        if self.kernel == "backward_query":
            grad_query = self._rows_like(query)
            # The others belong to a gradient of the reference key, which is not asked for.
            statistics = torch.full_like(self.statistics, math.nan)
            launch = self._query_launch(grad_query, statistics, config)
            return Planned([launch], {"grad_query": grad_query, "statistics": statistics[..., :5]})
        grad_key, grad_value = self._rows_like(key), self._rows_like(key)
        if self.kernel == "backward":
            assert config is not None
            grad_query = self._rows_like(query)
            results = {"grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}
            kept = None
            if config.fuse_dkv == "dk":
                kept = torch.full_like(self.statistics, math.nan)
                results.pop("grad_value")
            totals = (grad_key, results.get("grad_value"))
            launches = plan_backward_fused(
                self.inputs, self.gradients, grad_query, kept, totals,
                self.scale, False, self.device, config,
            )  # fmt: skip
            return Planned(launches, results)
        launches = plan_backward_key_value(
            self.inputs, self.gradients, self.statistics, (grad_key, grad_value, None),
            self.scale, self.device, config,
        )  # fmt: skip
        return Planned(launches, {"grad_key": grad_key, "grad_value": grad_value})


def compile_configs(
    problem: Problem, dtype: str, device: Device, kernel: str, configs: list[KernelConfig]
) -> None:
    """Compile configurations of one kernel into Triton's cache; one that fails is tried again."""
    bench = Bench(kernel, problem, getattr(torch, dtype), device)
    for config in configs:
        with contextlib.suppress(Exception):
            for launch in bench.plan(config).launches:
                launch.compile()


def compile_all(
    groups: list[tuple[list[Trial], list[Problem]]],
    dtype: torch.dtype,
    device: Device,
    jobs: int,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Compile all trials over some processes, which share the cache; `tick` is told how many.

    Compiling one takes a second or more and trying it far less.
    """
    a_task = 4
    word = str(dtype).removeprefix("torch.")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = {}
        for trials, problems in groups:
            for first in range(0, len(trials), a_task):
                configs = [trial.config for trial in trials[first : first + a_task]]
                kernel = trials[0].place.kernel
                task = pool.submit(compile_configs, problems[0], word, device, kernel, configs)
                pending[task] = len(configs)
        for task in as_completed(pending):
            task.result()
            tick(pending[task])


def difference(found: Planned, wanted: Planned, dtype: torch.dtype) -> str | None:
    """None where the results agree within the dtype's rounding, else what is off and by how much.

    Eight units in the last place of the largest element; partial subject_losses are summed first.
    """
    limit = 8.0 * torch.finfo(dtype).eps
    for name, got in found.results.items():
        true = wanted.results[name].double()
        got = got.double()
        if name == "subject_loss":
            got, true = got.sum((1, 2)), true.sum((1, 2))
        error = ((got - true).abs().max() / true.abs().max().clamp_min(1e-30)).item()
        if not error <= limit:
            return f"{name} is off by {error:.2g} of its scale, allowed are {limit:.2g}"
    return None


def _synchronize(device: Device) -> None:
    if not device.interpreted:
        torch.cuda.synchronize()


def check(
    trials: list[Trial], bench: Bench, dtype: torch.dtype, tick: Callable[[Trial], None]
) -> dict[int, Planned]:
    """Run each trial once; those that fail or differ from the default's results are dropped.

    The first trial is the default. The plans of the sound ones come back by their place in the
    list. RuntimeError where the default itself does not run: nothing can be compared then.
    """
    wanted = bench.plan(trials[0].config)
    try:
        wanted.run()
        _synchronize(bench.device)
    except Exception as error:
        raise RuntimeError(
            f"the default of {trials[0].place} does not run, so nothing can be held against it: "
            f"{error}"
        ) from error
    sound: dict[int, Planned] = {}
    for index, trial in enumerate(trials):
        if trial.dropped is None:
            try:
                planned = bench.plan(trial.config)
                planned.run()
                resident = planned.resident(bench.device.capability)
                if not trial.default and resident not in (None, trial.config.ctas_per_sm):
                    trial.config = trial.config._replace(ctas_per_sm=resident)
                    planned = bench.plan(trial.config)
                    planned.run()
                _synchronize(bench.device)
                trial.dropped = difference(planned, wanted, dtype)
            except Exception as error:  # noqa: BLE001 - too little shared memory has many names
                first = (str(error).strip() or "no reason given").splitlines()[0]
                trial.dropped = f"does not run: {type(error).__name__}: {first[:120]}"
            if trial.dropped is None:
                sound[index] = planned
        tick(trial)
    return sound


def _ratio(trial: Trial, default: Trial) -> float:
    """Geometric mean over the problems of the time over the default's."""
    times, usual = trial.figures["times"], default.figures["times"]
    logs = [math.log(times[name]["median"] / usual[name]["median"]) for name in usual]
    return math.exp(sum(logs) / len(logs))


def measure_place(
    trials: list[Trial],
    problems: list[Problem],
    dtype: torch.dtype,
    device: Device,
    tick: Callable[[Trial], None],
    time_calls: Time = interleaved_cuda,
) -> Winner | None:
    """Check and time all trials of one place; the best where it beats the default by more than
    the noise, in a second run of the two alone.
    """
    default = trials[0]
    benches = {p.name: Bench(default.place.kernel, p, dtype, device) for p in problems}
    for name, bench in benches.items():
        sound = check(trials, bench, dtype, tick)
        timings = time_calls({str(i): planned.run for i, planned in sound.items()}, TRY)
        for index in sound:
            figures = trials[index].figures
            figures.setdefault("times", {})[name] = timings[str(index)]._asdict()
    # A trial that was right on one problem and wrong on another has no say.
    right = [trial for trial in trials if trial.dropped is None]
    best = min(right, key=lambda trial: _ratio(trial, default))
    if best is default:
        return None
    logs, noise, words = [], 0.0, []
    for name, bench in benches.items():
        calls = {"default": bench.plan(default.config).run, "best": bench.plan(best.config).run}
        again = time_calls(calls, AGAIN)
        usual, new = again["default"], again["best"]
        logs.append(math.log(new.median / usual.median))
        noise = max(noise, usual.spread + new.spread)
        words.append(f"{name} {time_text(usual.median)} -> {time_text(new.median)}")
    gain = 1.0 - math.exp(sum(logs) / len(logs))
    best.figures |= {"gain": gain, "noise": noise}
    if gain <= max(noise, LEAST_GAIN):
        return None
    evidence = f"{gain:.0%} faster, noise {noise:.0%}: {'; '.join(words)}"
    return Winner(best.place, best.config, evidence)
