"""Try launch configurations on a CUDA device and print lines for the table in kernels/configs.py.

    python benchmarks/tune_kernels.py --jobs 8

Candidates are checked against the default first, then timed. Paste the printed lines into the
table; no training or generation starts the tuner.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

# Triton reads these when the kernels are imported; the interpreter compiles nothing.
if __name__ in ("__main__", "__mp_main__"):
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
from common.occupancy import LIMITS, occupancy
from common.reference import make_inputs
from common.report import Row, reason, time_text, write_report
from common.shapes import MODELS, Problem
from common.timing import Effort, Timing, interleaved_cuda
from sefi_fast.kernels import (
    Device,
    KernelConfig,
    Launch,
    empty_row_stats,
    plan_backward_fused,
    plan_backward_key_value,
    plan_backward_query,
    plan_forward,
)
from sefi_fast.kernels.configs import (
    TABLE,
    WIDTHS,
    choose_config,
    choose_fused_config,
    smallest_tile,
    split_tile,
)
from torch import Tensor
from tqdm import tqdm

from sefi_fast.ops.dispatch import cuda_device
from sefi_fast.ops.inputs import AttentionInputs, OutputGrads

KERNELS = ("forward", "backward", "backward_query", "backward_key_value")
DTYPES = ("bfloat16", "float16", "float32")
BATCHES = (1, 16)
LEAST_GAIN = 0.01
TRY = Effort(0.05, 0.02, 9)
AGAIN = Effort(0.5, 0.02, 25)
"""The best of many is lucky too: it is timed once more against the default alone."""

# Head widths for a bucket in which no layer of a known model lies.
_STAND_INS = (40, 64, 80, 160, 256, 32)
_QUERIES = 1024
_SHAPES = {
    "half": ((16, 4), (32, 4), (32, 8), (64, 4), (64, 8), (128, 8)),
    "single": ((16, 4), (16, 8), (32, 4), (32, 8), (64, 8)),
}
KEY_TILES = (0, 16, 32, 64)
# By warps: the compiler's choice, and limits for three or four (of eight warps: two) per SM.
_REGISTERS = {4: (0, 128, 168), 8: (0, 128)}


class Slot(NamedTuple):
    """One entry of the table of configurations; capability is the device's."""

    kernel: str
    capability: int
    precision: str
    width: int


@dataclass
class Candidate:
    """One configuration for a slot: its figures, or the reason why it was dropped."""

    slot: Slot
    config: KernelConfig
    default: bool
    dropped: str | None = None
    times: dict[str, Timing] = field(default_factory=dict)
    """By problem."""
    figures: dict[str, float] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Return one flat row a problem, or one without a time."""
        common = {**self.slot._asdict(), **self.config._asdict()}
        common |= {"default": self.default, "dropped": self.dropped}
        times: dict[str, Any] = {name: timing._asdict() for name, timing in self.times.items()}
        return [
            {**common, "problem": name, **timing, **self.figures}
            for name, timing in (times or {"": {}}).items()
        ]


class Best(NamedTuple):
    """A configuration that beats the default of its slot, and the evidence in words."""

    slot: Slot
    config: KernelConfig
    evidence: str


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[48, 64, 80, 160], choices=WIDTHS, metavar="D",
        help="upper ends of the table's head_dim buckets",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="compiling processes")
    parser.add_argument("--output", type=Path, help="folder for all tried configurations")
    return parser.parse_args(arguments)


def precision_of(dtype: torch.dtype) -> str:
    """Return the table's word for an element type."""
    return "single" if dtype.itemsize == 4 else "half"


@functools.cache
def table_width(kernel: str, capability: int, dtype: torch.dtype, head_dim: int) -> int:
    """Return the bucket in which a kernel looks up a head_dim: that of its tiles."""
    smallest = smallest_tile(kernel, precision_of(dtype), capability)
    width = sum(split_tile(head_dim, smallest))
    return next(limit for limit in WIDTHS if width <= limit)


def default_of(slot: Slot) -> KernelConfig | None:
    """Return the table's configuration for 77 keys; None if the slot has no such kernel."""
    kernel, capability, precision, width = slot
    if kernel == "backward":
        return choose_fused_config(capability, precision, width, 80)
    return choose_config(kernel, capability, precision, width, 80)


def problems_of(slot: Slot, dtype: torch.dtype) -> list[Problem]:
    """Return the layers of known models that use a slot, at each batch.

    If there is none, one layer of 8 heads is made up. The list is empty for widths that the kernel
    never looks up.
    """
    kernel, capability, _, width = slot
    if default_of(slot) is None:
        return []

    def lies_here(head_dim: int) -> bool:
        return table_width(kernel, capability, dtype, head_dim) == width

    found = [
        Problem(model, layer.queries, layer.head_dim, layer.heads, batch)
        for model, layers in MODELS.items()
        for layer in layers
        if lies_here(layer.head_dim)
        for batch in BATCHES
    ]
    stand_in = next(filter(lies_here, _STAND_INS), None)
    if found or stand_in is None:
        return found
    return [Problem("custom", _QUERIES, stand_in, 8, batch) for batch in BATCHES]


def candidates(slot: Slot) -> list[Candidate]:
    """Return the default, then every other configuration worth a try, each once.

    Their programs per SM are known only when they are compiled.
    """
    shapes = _SHAPES[slot.precision]
    default = default_of(slot)
    assert default is not None
    if slot.kernel == "backward":
        # A sum of fewer or more gradients is different work: it keeps the default's.
        tried = [
            default._replace(
                block_m=block,
                num_warps=warps,
                max_registers=registers,
                prefetch=prefetch,
                load_do_late=late,
            )
            for block, warps in shapes
            for prefetch, late in ((False, False), (True, False), (False, True))
            for registers in _REGISTERS[warps]
        ]
    elif slot.kernel == "backward_key_value":
        tried = [
            KernelConfig(block, warps, stages, reload, separate, key_tile)
            for (block, warps), (stages, reload), separate, key_tile in product(
                shapes, ((1, False), (1, True), (2, True)), (False, True), KEY_TILES
            )
        ]
    else:
        tried = [
            KernelConfig(block, warps, stages, reload, max_registers=registers, load_do_late=late)
            for (block, warps), stages, reload in product(shapes, (1, 2), (False, True))
            for registers in _REGISTERS[warps]
            for late in ((False,) if slot.kernel == "forward" or reload else (False, True))
        ]
    others = [c for c in tried if c._replace(ctas_per_sm=default.ctas_per_sm) != default]
    configs = dict.fromkeys([default, *others])
    return [Candidate(slot, config, config is default) for config in configs]


def as_code(config: KernelConfig) -> str:
    """Return the configuration as the table writes it: block, warps, stages, then non-defaults."""
    named = [
        f"{name}={value!r}".replace("'", '"')
        for name, value in config._asdict().items()
        if name in config._field_defaults and value != config._field_defaults[name]
    ]
    return f"KernelConfig({', '.join([*map(str, config[:3]), *named])})"


def table_lines(found: Sequence[Best]) -> Iterator[str]:
    """Yield lines for TABLE in kernels/configs.py, under the key to which they belong.

    A key that is not in the table gets all widths; those without a better configuration get their
    default.
    """
    for key in dict.fromkeys(best.slot[:3] for best in found):
        kernel, capability, precision = key
        yield f'    ("{kernel}", {capability}, "{precision}"): {{'
        here = {best.slot.width: best for best in found if best.slot[:3] == key}
        for width in WIDTHS if key not in TABLE else sorted(here):
            config = default_of(Slot(kernel, capability, precision, width))
            if width in here:
                yield f"        # {here[width].evidence}"
                config = here[width].config
            if config is not None:
                yield f"        {width}: {as_code(config)},"
        yield "    },"


class Planned(NamedTuple):
    """Launches of one configuration on one problem, and the tensors that they write."""

    launches: list[Launch]
    results: dict[str, Tensor]

    def run(self) -> None:
        for launch in self.launches:
            launch.run()

    def resident(self, capability: int) -> int | None:
        """Return the compiled kernel's programs per SM, if they are known."""
        compiled = self.launches[0].prepared.compiled
        if compiled is None or capability not in LIMITS:
            return None
        warps, shared = self.launches[0].config.num_warps, compiled.metadata.shared
        return occupancy(capability, compiled.n_regs, warps, shared).blocks


class Bench:
    """One kernel on one problem: the tensors that all configurations share."""

    def __init__(self, kernel: str, problem: Problem, dtype: torch.dtype, device: Device) -> None:
        self.kernel = kernel
        self.device = device
        place = torch.device("cpu" if device.interpreted else "cuda")
        tensors = make_inputs(problem, place, dtype)
        self.scale = tensors.scale
        query, key, value = (tensor.detach() for tensor in tensors[:3])
        self.inputs = AttentionInputs(query, key, value, tensors.reference_key)
        self.gradients = OutputGrads(tensors.grad_output, tensors.grad_subject_loss, None)
        self.row_stats = empty_row_stats(query)
        if kernel == "backward_key_value":
            self._query_launch(None, self.row_stats, None).run()

    def _rows_like(self, like: Tensor) -> Tensor:
        """Return [B, rows, H, D] of NaN: elements that a kernel does not write show."""
        batch, heads, rows, head_dim = like.shape
        return like.new_full((batch, rows, heads, head_dim), math.nan)

    def _query_launch(
        self, grad_query: Tensor | None, row_stats: Tensor, config: KernelConfig | None
    ) -> Launch:
        return plan_backward_query(
            self.inputs, self.gradients, grad_query, row_stats,
            self.scale, False, self.device, config,
        )  # fmt: skip

    def plan(self, config: KernelConfig) -> Planned:
        """Return the launches under `config`."""
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
            # The sixth statistic belongs to the reference key's gradient, which is not computed.
            row_stats = torch.full_like(self.row_stats, math.nan)
            launch = self._query_launch(grad_query, row_stats, config)
            return Planned([launch], {"grad_query": grad_query, "row_stats": row_stats[..., :5]})
        grad_key, grad_value = self._rows_like(key), self._rows_like(key)
        if self.kernel == "backward":
            grad_query = self._rows_like(query)
            results = {"grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}
            kept = None
            if config.fuse_dkv == "dk":
                kept = torch.full_like(self.row_stats, math.nan)
                results.pop("grad_value")
            totals = (grad_key, results.get("grad_value"))
            launches = plan_backward_fused(
                self.inputs, self.gradients, grad_query, kept, totals,
                self.scale, False, self.device, config,
            )  # fmt: skip
            return Planned(launches, results)
        launches = plan_backward_key_value(
            self.inputs, self.gradients, self.row_stats, (grad_key, grad_value, None),
            self.scale, self.device, config,
        )  # fmt: skip
        return Planned(launches, {"grad_key": grad_key, "grad_value": grad_value})


def compile_configs(
    problem: Problem, dtype: torch.dtype, device: Device, kernel: str, configs: list[KernelConfig]
) -> None:
    """Compile configurations into Triton's cache; one that fails is tried again by `check`."""
    bench = Bench(kernel, problem, dtype, device)
    for config in configs:
        with contextlib.suppress(Exception):
            for launch in bench.plan(config).launches:
                launch.compile()


def compile_all(
    slots: dict[Slot, list[Candidate]], dtype: torch.dtype, device: Device, jobs: int
) -> None:
    """Compile all candidates in some processes: compiling takes seconds, a trial far less."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        tasks = []
        for slot, tried in slots.items():
            problem = problems_of(slot, dtype)[0]
            for first in range(0, len(tried), 4):
                configs = [candidate.config for candidate in tried[first : first + 4]]
                arguments = (problem, dtype, device, slot.kernel, configs)
                tasks.append(pool.submit(compile_configs, *arguments))
        for task in tqdm(as_completed(tasks), total=len(tasks), unit="four kernels"):
            task.result()


def difference(found: Planned, wanted: Planned, dtype: torch.dtype) -> str | None:
    """Return None if the results agree, else the first difference in words.

    Allowed are eight units in the last place of the largest element. Partial losses are summed.
    """
    limit = 8.0 * torch.finfo(dtype).eps
    for name, got in found.results.items():
        got, true = got.double(), wanted.results[name].double()
        if name == "subject_loss":
            got, true = got.sum((1, 2)), true.sum((1, 2))
        error = ((got - true).abs().max() / true.abs().max().clamp_min(1e-30)).item()
        if not error <= limit:
            return f"{name} is off by {error:.2g} of its scale, allowed are {limit:.2g}"
    return None


def check(tried: list[Candidate], bench: Bench, dtype: torch.dtype) -> dict[str, Planned]:
    """Run each candidate; drop those that fail or differ from the first, the default.

    Return the plans of the others by their place in the list.

    Raises:
        RuntimeError: the default does not run.
    """

    def run(config: KernelConfig) -> Planned:
        planned = bench.plan(config)
        planned.run()
        if not bench.device.interpreted:
            torch.cuda.synchronize()
        return planned

    try:
        wanted = run(tried[0].config)
    except Exception as error:
        raise RuntimeError(
            f"the default of {tried[0].slot} does not run, so there is nothing to compare with: "
            f"{error}"
        ) from error
    passed = {"0": wanted}
    for index, candidate in enumerate(tried[1:], 1):
        if candidate.dropped is not None:
            continue
        try:
            planned = run(candidate.config)
            resident = planned.resident(bench.device.capability)
            if resident not in (None, candidate.config.ctas_per_sm):
                candidate.config = candidate.config._replace(ctas_per_sm=resident)
                planned = run(candidate.config)
            candidate.dropped = difference(planned, wanted, dtype)
        except Exception as error:  # noqa: BLE001 - too little shared memory raises several types
            candidate.dropped = f"does not run: {type(error).__name__}: {reason(error)}"
        if candidate.dropped is None:
            passed[str(index)] = planned
        else:
            where = f"sm_{candidate.slot.capability} {candidate.slot.kernel}"
            text = f"dropped: {where}, {as_code(candidate.config)}: {candidate.dropped}"
            tqdm.write(text, sys.stderr)
    return passed


def measure_slot(
    tried: list[Candidate],
    problems: list[Problem],
    dtype: torch.dtype,
    device: Device,
    time_calls: Callable[[dict[str, Callable[[], None]], Effort], dict[str, Timing]] = (
        interleaved_cuda
    ),
) -> Best | None:
    """Check and time all candidates of a slot, the default first.

    The fastest wins if it beats the default by more than the noise, in a second run of the two.
    """
    default = tried[0]
    benches = {p.name: Bench(default.slot.kernel, p, dtype, device) for p in problems}
    for name, bench in benches.items():
        plans = check(tried, bench, dtype)
        timings = time_calls({index: planned.run for index, planned in plans.items()}, TRY)
        for index, timing in timings.items():
            tried[int(index)].times[name] = timing

    def ratio(candidate: Candidate) -> float:
        return _mean_ratio(
            [(default.times[name], timing) for name, timing in candidate.times.items()]
        )

    # A candidate that failed on any problem does not count.
    best = min((one for one in tried if one.dropped is None), key=ratio)
    if best is default:
        return None
    pairs = {}
    for name, bench in benches.items():
        calls = {"default": bench.plan(default.config).run, "best": bench.plan(best.config).run}
        again = time_calls(calls, AGAIN)
        pairs[name] = (again["default"], again["best"])
    gain = 1.0 - _mean_ratio(list(pairs.values()))
    noise = max(usual.spread + new.spread for usual, new in pairs.values())
    best.figures = {"gain": gain, "noise": noise}
    if gain <= max(noise, LEAST_GAIN):
        return None
    words = [
        f"{name} {time_text(usual.median)} -> {time_text(new.median)}"
        for name, (usual, new) in pairs.items()
    ]
    return Best(best.slot, best.config, f"{gain:.0%} faster, noise {noise:.0%}: {'; '.join(words)}")


def _mean_ratio(pairs: list[tuple[Timing, Timing]]) -> float:
    """Return the geometric mean of second times over first times."""
    logs = [math.log(new.median / usual.median) for usual, new in pairs]
    return math.exp(sum(logs) / len(logs))


def tune(options: argparse.Namespace) -> list[Best]:
    """Check and time all candidates of all chosen slots; write them after each slot."""
    found = cuda_device(torch.cuda.current_device())
    device = Device(found.capability, found.multiprocessors, False)
    dtype = getattr(torch, options.dtype)
    slots = {
        slot: candidates(slot)
        for kernel, width in product(options.kernels, options.widths)
        if problems_of(slot := Slot(kernel, found.capability, precision_of(dtype), width), dtype)
    }
    if options.jobs > 1:
        compile_all(slots, dtype, device, options.jobs)
    bests: list[Best] = []
    rows: list[Row] = []
    for slot, tried in tqdm(slots.items(), unit="slot"):
        best = measure_slot(tried, problems_of(slot, dtype), dtype, device)
        bests += [best] if best else []
        rows += [row for candidate in tried for row in candidate.rows()]
        if options.output:
            # After each slot: an interrupted run keeps its results.
            report = {"benchmark": "tune_kernels", "dtype": options.dtype, "results": rows}
            report["lines"] = list(table_lines(bests))
            write_report(report, torch.device("cuda"), options.output)
        torch.cuda.empty_cache()
    return bests


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 2 without a CUDA device."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("tune_kernels: no CUDA device: times need one", file=sys.stderr)
        return 2
    bests = tune(options)
    if not bests:
        print("no candidate is better than the defaults")
    for line in table_lines(bests):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
