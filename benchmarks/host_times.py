"""What a call of the operator costs the host, in Python and in launching: nothing waits for a GPU.

    python benchmarks/host_times.py

Few rows and one head, so that a device keeps up with the host. Without a GPU Triton gets one that
starts nothing, and its backend is called below PyTorch's autograd and dispatcher.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from statistics import median
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)

import torch  # noqa: E402
from _contenders import contenders  # noqa: E402
from _rates import device_name  # noqa: E402
from _reference import Inputs, make_inputs  # noqa: E402
from _report import environment, table, write_report  # noqa: E402
from _shapes import Problem  # noqa: E402
from _workload import Workload  # noqa: E402

CALLS = 50
ROUNDS = 9
IDLE = "sefi-triton, nothing started"
PROBLEM = Problem("custom", 16, 40, 1)


def _idle_calls(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Forward and backward of the Triton backend alone, on a device that starts nothing."""
    from _idle_driver import IdleDriver
    from sefi_fast.kernels import Device

    from sefi_fast.ops import triton as backend
    from sefi_fast.ops.types import AttentionInputs, Options, OutputGrads

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


def calls_of(
    device: torch.device, without: Collection[str] = ()
) -> dict[str, dict[str, Callable[[], object]]]:
    """By contender but those left out, forward and backward or what can be had of them."""
    inputs = make_inputs(PROBLEM, device, torch.bfloat16)
    found: dict[str, dict[str, Callable[[], object]]] = {}
    for contender in contenders(device, ["sefi-triton", "sefi-cuda", "sefi-cpu", "sdpa"])[0]:
        if contender.name not in without:
            workload = Workload(contender, inputs)
            calls = {direction: workload.call(direction) for direction in ("both", "forward")}
            found[contender.name] = calls
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        found[IDLE] = _idle_calls(inputs)
    return found


def host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median over rounds of the seconds until a call returns, the mean of a round's calls."""
    seconds = []
    for _ in range(ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        seconds.append((time.perf_counter() - start) / CALLS)
    return median(seconds[1:])


def run(device: torch.device, folder: Path, without: Collection[str] = ()) -> dict[str, Any]:
    """Measure, print and write; the report."""
    rows: list[dict[str, Any]] = [
        {"contender": name, "direction": direction, "seconds": host_seconds(call, device)}
        for name, calls in calls_of(device, without).items()
        for direction, call in calls.items()
    ]
    cells = [[row["contender"], row["direction"], f"{row['seconds'] * 1e6:.0f}"] for row in rows]
    print(table(["contender", "direction", "host us a call"], cells))
    report = {
        "benchmark": "host_times",
        "environment": environment(device),
        "problem": PROBLEM.name,
        "results": rows,
    }
    for written in write_report(folder, report):
        print(f"wrote {os.path.relpath(written)}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    run(device, options.output or _ROOT / "benchmarks" / "results" / device_name(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
