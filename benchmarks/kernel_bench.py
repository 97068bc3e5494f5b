"""What each kernel of forward and backward takes on a CUDA device, by PyTorch's profiler.

python benchmarks/kernel_times.py
python benchmarks/kernel_times.py --shapes sd15:4096 --batches 1 16 --only sefi-triton sdpa-cudnn
python benchmarks/kernel_times.py --batches 1 --cold all data nothing    # to kernel_times_cold.csv

A kernel that is started early, as those of the C++ backend that add up, waits for the one before
it, and its time counts from its start: the whole call's is attn_bench.py's.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)

import torch  # noqa: E402
from _contenders import Contender, contenders  # noqa: E402
from _measure import FLUSH_BYTES  # noqa: E402
from _rates import device_name  # noqa: E402
from _reference import make_inputs  # noqa: E402
from _report import environment, table, write_report  # noqa: E402
from _run import reason  # noqa: E402
from _shapes import Problem, problems  # noqa: E402
from _workload import Workload  # noqa: E402

CALLS = 10
# The write that empties the L2 cache before each call.
_FLUSH = re.compile(r"FillFunctor|Memset", re.I)


def short_name(name: str) -> str:
    """A kernel's own name and the numbers it is made for, without namespaces and arguments."""
    bare = re.sub(r"\([^()]*\)$", "", name.strip().removeprefix("void "))
    head, _, parameters = bare.partition("<")
    numbers = re.findall(r"(?<![\w:])\(?(?:int\))?(\d+)(?![\w:])", parameters)
    own = re.split(r"::", head.replace("(anonymous namespace)::", ""))[-1]
    return f"{own}<{', '.join(numbers)}>" if numbers else own


def last_calls(
    events: Iterable[tuple[float, str, float]], calls: int = CALLS
) -> list[tuple[str, float]]:
    """(name, microseconds) of the second half of each of `calls` equal stretches.

    events: (when it began, name, microseconds), the cache's flush among them.
    """
    ordered = [event[1:] for event in sorted(events) if not _FLUSH.search(event[1])]
    each = len(ordered) // calls
    return [event for i, event in enumerate(ordered) if i % each >= each // 2]


def by_kernel(events: Iterable[tuple[str, float]], calls: int = CALLS) -> dict[str, float]:
    """Seconds a call of each kernel, from (name, microseconds) of every run in `calls` calls."""
    totals: dict[str, float] = {}
    for name, microseconds in events:
        if not _FLUSH.search(name):
            short = short_name(name)
            totals[short] = totals.get(short, 0.0) + microseconds * 1e-6
    return {name: seconds / calls for name, seconds in totals.items()}


def profile(
    workload: Workload, device: torch.device, before: Workload | None = None, flushed: bool = True
) -> dict[str, float]:
    """Seconds a call of each kernel; flushed: behind a write that empties the L2 cache each time.

    before: the same call on other tensors, which brings the kernels' code back into the cache.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    calls = [one.call("both") for one in (before, workload) if one is not None]
    for call in 3 * calls:
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            if flushed:
                flush.zero_()
            for call in calls:
                call()
        torch.cuda.synchronize()
    events = [
        (event.time_range.start, event.name, event.device_time)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return by_kernel(last_calls(events) if before else [event[1:] for event in events])


def rows_of(
    problem: Problem, contender: Contender, kernels: dict[str, float], cold: str = "all"
) -> list[dict]:
    """A flat row a kernel, the longest first."""
    ordered = sorted(kernels.items(), key=lambda item: -item[1])
    return [
        {
            "layer": problem.layer,
            "batch": problem.batch,
            "contender": contender.name,
            "kernel": name,
            "cold": cold,
            "seconds": seconds,
            "picoseconds_a_row": seconds / problem.rows * 1e12,
        }
        for name, seconds in ordered
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["sd15", "sdxl"], metavar="SHAPE")
    parser.add_argument("--batches", nargs="+", type=int, default=[16], metavar="B")
    parser.add_argument(
        "--only", nargs="+", default=["sefi-triton", "sefi-cuda", "sdpa-cudnn"], metavar="NAME"
    )
    parser.add_argument(
        "--cold", nargs="+", choices=("all", "data", "nothing"), default=["all"],
        help="what is not in the L2 cache when a call begins; data: all but the kernels' code",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every contender on every layer; the report, which is written too."""
    field, absent = contenders(device, options.only)
    field = [contender for contender in field if contender.family != "eager"]
    found: list[dict] = []
    chosen = problems(options.shapes, options.batches)
    for problem, contender, cold in product(chosen, field, options.cold):
        try:
            workload, *before = (
                Workload(contender, make_inputs(problem, device, torch.bfloat16))
                for _ in range(2 if cold == "data" else 1)
            )
            with contender.context():
                kernels = profile(workload, device, *before, flushed=cold != "nothing")
        except Exception as error:  # noqa: BLE001 - one that cannot leaves the others theirs
            print(f"{problem.name}, {contender.name}: {reason(error)}", file=sys.stderr)
            continue
        rows = rows_of(problem, contender, kernels, cold)
        found += rows
        cells = [
            [row["kernel"], f"{row['seconds'] * 1e6:.1f}", f"{row['picoseconds_a_row']:.0f}"]
            for row in rows
        ]
        print(f"\n{problem.name}, {contender.name}, cold: {cold}")
        print(table(["kernel", "us", "ps a row"], cells))
    report = {
        "benchmark": "kernel_times" if options.cold == ["all"] else "kernel_times_cold",
        "environment": environment(device),
        "absent": absent,
        "results": found,
    }
    folder = options.output or _ROOT / "benchmarks" / "results" / device_name(device)
    for written in write_report(folder, report):
        print(f"wrote {os.path.relpath(written)}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 2 where there is no CUDA device or a word fits nothing."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("kernel_times: no CUDA device on this machine", file=sys.stderr)
        return 2
    try:
        run(options, torch.device("cuda"))
    except ValueError as error:
        print(f"kernel_times: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
