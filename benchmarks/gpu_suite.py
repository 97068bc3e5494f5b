"""One command for a machine with a GPU: build, check every backend, then measure; ten minutes.

    python benchmarks/gpu_suite.py

Without a GPU it runs dry: the CPU's checks run, and the report says that no GPU gave a figure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)

import attn_bench  # noqa: E402
import step_bench  # noqa: E402
import subjects_bench  # noqa: E402
import torch  # noqa: E402
from _bars import bars_of  # noqa: E402
from _contenders import COMPILED, contenders  # noqa: E402
from _gpu_checks import Check, all_checks  # noqa: E402
from _measure import FULL  # noqa: E402
from _rates import device_name  # noqa: E402
from _record import ProblemRecord  # noqa: E402
from _report import bars_table, environment, table, write_json  # noqa: E402
from _run import reason  # noqa: E402
from _shapes import problems  # noqa: E402
from tqdm import tqdm  # noqa: E402

NO_GPU = "no CUDA device on this machine: nothing here was measured on a GPU"
_BUILD_SECONDS = 150
_TRAINING_SECONDS = 150


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the suite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument("--small", action="store_true", help="small checks and one small shape")
    parser.add_argument("--no-build", action="store_true", help="use the native core as it is")
    return parser.parse_args(arguments)


def build(skip: bool) -> str:
    """Build the native modules in place where one is missing; what was done, in words."""
    from sefi_fast import available_backends
    from sefi_fast.ops import cuda

    missing = available_backends().get("cpu")
    built = cuda.architectures()
    kernels = f"CUDA kernels for {', '.join(built)}" if built else "no CUDA C++ kernels"
    if missing is None and (built or skip or not torch.cuda.is_available()):
        return f"native core present, {kernels}"
    if skip:
        return f"native core not built: {missing}"
    if not (_ROOT / "setup.py").exists():
        return "native core missing and no setup.py to build it from"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=_BUILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"native core not built: the build took over {_BUILD_SECONDS} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"native core not built: {lines[-1]}"
    # A library that this process failed to import once is looked for again only in a new one.
    os.execv(sys.executable, [sys.executable, *sys.argv, "--no-build"])


def run_checks(device: torch.device, small: bool) -> list[Check]:
    """All checks with a progress line each."""
    with tqdm(unit="check", file=sys.stderr) as bar:

        def tick(check: Check) -> None:
            bar.update()
            bar.set_description(f"{check.contender} {check.dtype} {check.name}"[:60])

        return all_checks(device, small, tick, apart=device.type == "cuda")


def checks_table(checks: list[Check]) -> str:
    """Every check on a line."""
    rows = [[c.contender, c.dtype, c.name, c.status, c.detail[:110]] for c in checks]
    return table(["backend", "dtype", "check", "answer", "detail"], rows)


def measure_gpu(device: torch.device, deadline: float, small: bool, folder: Path) -> dict[str, Any]:
    """attn_bench at full size, without what compiles first, then that on SD 1.5 and SDXL.

    Compiling takes longer than measuring, so it comes last and stops at the deadline; what was
    left out is named in the report.
    """
    options = attn_bench.parse(["--device", device.type])
    torch._functorch.config.donated_buffer = False
    field, absent = contenders(device)
    ready = [contender for contender in field if contender.family not in COMPILED]
    chosen = problems(["sd15:1024"], [2]) if small else attn_bench.chosen_problems(options, device)
    records, rates = attn_bench.measure_all(
        chosen, ready, device, ["bfloat16"], FULL, options, deadline
    )
    with_compiled = [] if small else problems(["sd15", "sdxl"], [4])
    compiled_records, _ = attn_bench.measure_all(
        with_compiled, field, device, ["bfloat16"], FULL, options, deadline
    )
    newer = {record.problem: record for record in compiled_records}
    merged: list[ProblemRecord] = [newer.get(record.problem, record) for record in records]
    measured = {record.problem for record in records}
    settings = {
        "dtypes": ["bfloat16"],
        "seconds_a_call": FULL.seconds,
        "rounds_at_least": FULL.rounds,
        "seed": options.seed,
        "left_out_for_time": [p.name for p in chosen if p not in measured],
        "compiled_contenders_on": [p.name for p in newer],
    }
    report = attn_bench.content(merged, rates, absent, device, settings)
    attn_bench.write_results(merged, report, folder)
    print(bars_table(bars_of(merged)))
    return report


def measure_training(device: torch.device, deadline: float, folder: Path) -> dict[str, Any]:
    """The short forms of the training benchmarks; none is begun after `deadline`.

    One that fails is named with its reason, and the others are measured all the same.
    """
    found: dict[str, Any] = {}
    for name, bench in (("step_bench", step_bench), ("subjects_bench", subjects_bench)):
        if time.monotonic() > deadline:
            found[name] = "left out for time"
            continue
        arguments = ["--quick", "--device", device.type, "--output", str(folder)]
        try:
            report = bench.run(bench.parse(arguments))
        except Exception as error:  # noqa: BLE001 - the operator's figures must not be lost with it
            found[name] = f"failed: {type(error).__name__}: {reason(error)}"
            print(f"{name} {found[name]}")
            continue
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        found[name] = {key: report[key] for key in ("bars", "results") if key in report}
    return found


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Build, check, and on a GPU with nothing red measure; the report and where it was written."""
    started = time.monotonic()
    built = build(options.no_build)
    gpu = torch.cuda.is_available()
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if gpu else [])
    checks: list[Check] = []
    for device in devices:
        # On a machine with a GPU the CPU's checks stay small: the time belongs to the GPU.
        checks += run_checks(device, options.small or device.type == "cpu")
    print(checks_table(checks))
    red = [check for check in checks if check.status == "failed"]
    device = devices[-1]
    folder = options.output or _ROOT / "benchmarks" / "results" / device_name(device)
    report: dict[str, Any] = {
        "benchmark": "gpu_suite",
        "device": device_name(device),
        "environment": environment(device),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "build": built,
        "checks": [check._asdict() for check in checks],
        "red": len(red),
    }
    if not gpu:
        report["note"] = NO_GPU
    elif red:
        report["note"] = "checks are red: nothing was timed"
    else:
        deadline = started + 60.0 * options.minutes
        bench = measure_gpu(device, deadline - _TRAINING_SECONDS, options.small, folder)
        report["note"] = "all checks passed; figures in attn_bench.json and beside it"
        report["bars"] = bench["bars"]
        report["training"] = measure_training(device, deadline, folder)
    report["seconds"] = round(time.monotonic() - started, 1)
    write_json(folder / "gpu_suite.json", report)
    return report, folder


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all checks passed (or no GPU and the CPU's passed), 1 when one is red."""
    report, folder = run(parse(arguments))
    print(report["note"])
    print(f"wrote {os.path.relpath(folder / 'gpu_suite.json')}")
    return 1 if report["red"] else 0


if __name__ == "__main__":
    sys.exit(main())
