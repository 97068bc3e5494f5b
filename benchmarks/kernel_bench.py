"""Times of a call's kernels on a CUDA device, by PyTorch's profiler, and of the host per call.

    python benchmarks/kernel_bench.py
    python benchmarks/kernel_bench.py --shapes sd15:4096 --only sefi-triton sdpa-cudnn
    python benchmarks/kernel_bench.py --cold all data nothing   # to kernel_times_cold.csv
    python benchmarks/kernel_bench.py --host                    # the host's times alone

A kernel that starts early, as the reductions of the C++ backend do, waits for the one before it.
Its time counts from its start: attn_bench.py measures the whole call.

The host's time is the time until a call returns, of few rows and one head, so that a device keeps
up. Without a GPU, Triton gets a device that runs no kernel, and its backend is called directly.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from statistics import median

import torch
from common.providers import EAGER, Provider, Workload, providers
from common.reference import Inputs, make_inputs
from common.report import Row, reason, table, write_report
from common.shapes import Problem, problems
from common.timing import FLUSH_BYTES

CALLS = 10
HOST_CALLS, HOST_ROUNDS = 50, 9
HOST_PROBLEM = Problem("custom", 16, 40, 1)
IDLE = "sefi-triton, nothing started"
# The write that empties the L2 cache before each call.
_FLUSH = re.compile(r"FillFunctor|Memset", re.I)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", action="store_true", help="times of the host only; needs no GPU")
    parser.add_argument("--shapes", nargs="+", default=["sd15", "sdxl"], metavar="SHAPE")
    parser.add_argument("--batches", nargs="+", type=int, default=[16], metavar="B")
    parser.add_argument(
        "--only", nargs="+", default=["sefi-triton", "sefi-cuda", "sdpa-cudnn"], metavar="NAME"
    )
    parser.add_argument(
        "--cold", nargs="+", choices=("all", "data", "nothing"), default=["all"],
        help="content missing from the L2 cache when a call begins; data: all but kernels' code",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    return parser.parse_args(arguments)


def short_name(name: str) -> str:
    """Return a kernel's name and its template's numbers, without namespaces and arguments."""
    bare = re.sub(r"\([^()]*\)$", "", name.strip().removeprefix("void "))
    head, _, parameters = bare.partition("<")
    numbers = re.findall(r"(?<![\w:])\(?(?:int\))?(\d+)(?![\w:])", parameters)
    own = re.split(r"::", head.replace("(anonymous namespace)::", ""))[-1]
    return f"{own}<{', '.join(numbers)}>" if numbers else own


def last_calls(
    events: Iterable[tuple[float, str, float]], calls: int = CALLS
) -> list[tuple[str, float]]:
    """Return (name, microseconds) of the second half of each of `calls` equal stretches.

    events: (start, name, microseconds), those of the cache's flush included.
    """
    ordered = [event[1:] for event in sorted(events) if not _FLUSH.search(event[1])]
    each = len(ordered) // calls
    return [event for i, event in enumerate(ordered) if i % each >= each // 2]


def by_kernel(events: Iterable[tuple[str, float]], calls: int = CALLS) -> dict[str, float]:
    """Return seconds a call of each kernel from (name, microseconds) of every run."""
    totals: dict[str, float] = {}
    for name, microseconds in events:
        if not _FLUSH.search(name):
            short = short_name(name)
            totals[short] = totals.get(short, 0.0) + microseconds * 1e-6
    return {name: seconds / calls for name, seconds in totals.items()}


def profile(
    provider: Provider, problem: Problem, device: torch.device, cold: str
) -> dict[str, float]:
    """Return seconds a call of each kernel.

    Unless cold is "nothing", a write empties the L2 cache before each call. With "data", the same
    call on other tensors follows the write and brings the kernels' code back into the cache.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    calls = [
        Workload(provider, make_inputs(problem, device, torch.bfloat16)).call("both")
        for _ in range(2 if cold == "data" else 1)
    ]
    for call in 3 * calls:
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            if cold != "nothing":
                flush.zero_()
            for call in calls:
                call()
        torch.cuda.synchronize()
    events = [
        (event.time_range.start, event.name, event.device_time)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return by_kernel(last_calls(events) if cold == "data" else [event[1:] for event in events])


def rows_of(problem: Problem, provider: str, kernels: dict[str, float], cold: str) -> list[Row]:
    """Return a flat row a kernel, the longest first."""
    return [
        {
            "layer": problem.layer,
            "batch": problem.batch,
            "provider": provider,
            "kernel": name,
            "seconds": seconds,
            "picoseconds_a_row": seconds / problem.rows * 1e12,
            "cold": cold,
        }
        for name, seconds in sorted(kernels.items(), key=lambda item: -item[1])
    ]


def measure_kernels(options: argparse.Namespace, device: torch.device) -> None:
    """Measure every provider on every layer; print and write the results."""
    found, absent = providers(device, options.only)
    found = [provider for provider in found if provider is not EAGER]
    rows: list[Row] = []
    chosen = problems(options.shapes, options.batches)
    for problem, provider, cold in product(chosen, found, options.cold):
        try:
            kernels = profile(provider, problem, device, cold)
        except Exception as error:  # noqa: BLE001 - one that fails must not lose the others' times
            print(f"{problem.name}, {provider.name}: {reason(error)}", file=sys.stderr)
            continue
        new = rows_of(problem, provider.name, kernels, cold)
        rows += new
        cells = [
            [row["kernel"], f"{row['seconds'] * 1e6:.1f}", f"{row['picoseconds_a_row']:.0f}"]
            for row in new
        ]
        print(f"\n{problem.name}, {provider.name}, cold: {cold}")
        print(table(["kernel", "us", "ps a row"], cells))
    name = "kernel_times" if options.cold == ["all"] else "kernel_times_cold"
    write_report({"benchmark": name, "absent": absent, "results": rows}, device, options.output)


def _idle_calls(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Return forward and backward of the Triton backend on a device that runs no kernel."""
    from common.idle_driver import IdleDriver
    from sefi_fast.kernels import Device

    from sefi_fast.ops import triton as backend
    from sefi_fast.ops.inputs import AttentionInputs, Options, OutputGrads

    IdleDriver().install()
    backend._device = lambda _: Device(90, 132, False)  # type: ignore[assignment]
    query, key, value, reference = (tensor.detach() for tensor in inputs[:4])
    tensors = AttentionInputs(query, key, value, reference)
    grads = OutputGrads(inputs.grad_output, inputs.grad_subject_loss, None)
    options = Options(False, inputs.scale, False, needs=(True, True, True, False))

    def forward() -> object:
        return backend.forward(tensors, options)

    def backward() -> object:
        return backend.backward(grads, tensors, options)

    return {"forward": forward, "backward": backward}


def host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median over rounds of the mean seconds until a call returns."""
    seconds = []
    for _ in range(HOST_ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        seconds.append((time.perf_counter() - start) / HOST_CALLS)
    return median(seconds[1:])


def measure_host(options: argparse.Namespace, device: torch.device) -> None:
    """Measure the host's time of every provider; print and write the results."""
    inputs = make_inputs(HOST_PROBLEM, device, torch.bfloat16)
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    for provider in providers(device, ["sefi-triton", "sefi-cuda", "sefi-cpu", "sdpa"])[0]:
        workload = Workload(provider, inputs)
        calls[provider.name] = {way: workload.call(way) for way in ("both", "forward")}
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        calls[IDLE] = _idle_calls(inputs)
    rows: list[Row] = [
        {"provider": name, "direction": direction, "seconds": host_seconds(call, device)}
        for name, directions in calls.items()
        for direction, call in directions.items()
    ]
    cells = [[row["provider"], row["direction"], f"{row['seconds'] * 1e6:.0f}"] for row in rows]
    print(table(["provider", "direction", "host us per call"], cells))
    report = {"benchmark": "host_times", "problem": HOST_PROBLEM.name, "results": rows}
    write_report(report, device, options.output)


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 2 without a CUDA device or for a word that fits nothing."""
    options = parse(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not options.host:
        print("kernel_bench: no CUDA device; --host measures the host's times", file=sys.stderr)
        return 2
    device = torch.device("cuda" if cuda else "cpu")
    try:
        if not options.host:
            measure_kernels(options, device)
        torch.set_num_threads(1)
        measure_host(options, device)
    except ValueError as error:
        print(f"kernel_bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
