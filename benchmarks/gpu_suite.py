"""Test the kernels on a GPU, then run the benchmarks; results are ready to commit.

    python benchmarks/gpu_suite.py

Needs a CUDA device. Nothing is measured when a test fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from common.rates import device_name
from common.report import RESULTS, Row, table, write_report

from sefi_fast import available_backends

ROOT = Path(__file__).resolve().parents[1]
# Most of a test's time is compilation.
PROCESSES = max(1, min(12, (os.cpu_count() or 2) - 1))
BENCHMARKS = (
    ("attn_bench", "--no-compiled", "--seconds", "0.1", "--minutes", "{minutes:.1f}"),
    ("kernel_bench",),
    ("step_bench", "--quick", "--models", "sd15"),
    ("subjects_bench", "--quick"),
    ("sample_bench", "--quick"),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="for the benchmarks, after the tests"
    )
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    return parser.parse_args(arguments)


def read_junit(path: Path) -> list[Row]:
    """Return name, status and detail of each test of a JUnit file."""
    rows = []
    for case in ElementTree.parse(path).iter("testcase"):
        status, detail = "pass", ""
        for kind, word in (("skipped", "skipped"), ("failure", "fail"), ("error", "fail")):
            if (found := case.find(kind)) is not None:
                status, detail = word, found.get("message", "").partition("\n")[0]
        rows.append({"name": case.get("name", ""), "status": status, "detail": detail})
    return rows


def run_tests(folder: Path) -> list[Row]:
    """Run the tests marked `gpu` in some processes; return a row a test.

    A kernel that breaks its process fails one test; pytest-xdist starts another process.
    """
    junit = folder / "gpu_tests.xml"
    junit.parent.mkdir(parents=True, exist_ok=True)
    command = ["-m", "gpu", "-n", str(PROCESSES), "--dist", "load", f"--junitxml={junit}"]
    subprocess.run([sys.executable, "-m", "pytest", *command, "tests"], cwd=ROOT, check=False)
    try:
        return read_junit(junit)
    finally:
        junit.unlink(missing_ok=True)


def run_benchmarks(folder: Path, deadline: float) -> dict[str, str]:
    """Run the benchmarks one after the other until the deadline; return the outcome of each."""
    outcomes = {}
    for name, *arguments in BENCHMARKS:
        minutes = (deadline - time.monotonic()) / 60
        if minutes <= 0:
            outcomes[name] = "left out for time"
            continue
        # The operator may take half of the time.
        given = [one.format(minutes=minutes / 2) for one in arguments]
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *given]
        done = subprocess.run([*command, "--output", str(folder)], check=False)
        outcomes[name] = "done" if done.returncode == 0 else f"exit status {done.returncode}"
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """Return 0, 1 when a test or a benchmark failed, or 2 without a CUDA device."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("gpu_suite: no CUDA device: nothing is tested or measured", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    folder = (options.output or RESULTS / device_name(device)).absolute()
    for name, why in available_backends().items():
        print(f"backend {name}: {why or 'available'}")
    rows = run_tests(folder)
    failed = [row for row in rows if row["status"] == "fail"]
    report = {"benchmark": "gpu_suite", "failed": len(failed), "results": rows}
    write_report(report, device, folder)
    if failed or not rows:
        print(table(["test", "status", "detail"], [list(row.values()) for row in failed]))
        print(f"{len(failed)} of {len(rows)} tests failed: nothing was measured")
        return 1
    outcomes = run_benchmarks(folder, time.monotonic() + 60.0 * options.minutes)
    print(table(["benchmark", "outcome"], [list(pair) for pair in outcomes.items()]))
    print(f"commit the files in {os.path.relpath(folder)}")
    return int(any(outcome.startswith("exit") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
