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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)

import attn_bench  # noqa: E402
import host_times  # noqa: E402
import kernel_times  # noqa: E402
import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
from _check_processes import checks_apart, checks_of_cpu  # noqa: E402
from _contenders import COMPILED, contenders  # noqa: E402
from _gpu_checks import Check, all_checks  # noqa: E402
from _measure import Effort  # noqa: E402
from _rates import device_name  # noqa: E402
from _report import environment, table, targets_table, write_report  # noqa: E402
from _run import reason  # noqa: E402
from _shapes import layers_of, problems  # noqa: E402
from tqdm import tqdm  # noqa: E402

NO_GPU = "no CUDA device on this machine: nothing here was measured on a GPU"
SHORT = Effort(0.1, 0.02, 15)
_BUILD_SECONDS = 150
_TRAINING_SECONDS = 90
_COMPILED_SECONDS = 60


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
    found = []
    with tqdm(unit="check", file=sys.stderr) as bar:
        for check in (checks_apart if device.type == "cuda" else all_checks)(device, small):
            bar.update()
            bar.set_description(f"{check.contender} {check.dtype} {check.name}"[:60])
            found.append(check)
    return found


def checks_table(checks: list[Check]) -> str:
    """Every check on a line."""
    rows = [[c.contender, c.dtype, c.name, c.status, c.detail[:110]] for c in checks]
    return table(["backend", "dtype", "check", "answer", "detail"], rows)


def measure_gpu(
    device: torch.device, deadline: float, small: bool, red: set[str], folder: Path
) -> None:
    """attn_bench at full size, of all but those with a red check and those that compile first."""
    options = attn_bench.parse(["--device", device.type])
    torch._functorch.config.donated_buffer = False
    field, absent = contenders(device)
    absent |= dict.fromkeys(sorted(red), "a check is red: see gpu_suite.csv")
    ready = [one for one in field if one.family not in COMPILED and one.name not in red]
    chosen = problems(["sd15:1024"], [2]) if small else attn_bench.chosen_problems(options, device)
    records, rates = attn_bench.measure_all(
        chosen, ready, device, ["bfloat16"], SHORT, options, deadline
    )
    measured = {record.problem for record in records}
    settings = {
        "dtypes": ["bfloat16"],
        "seconds_a_call": SHORT.seconds,
        "rounds_at_least": SHORT.rounds,
        "seed": options.seed,
        "left_out_for_time": [p.name for p in chosen if p not in measured],
    }
    report = attn_bench.content(records, rates, absent, device, settings)
    attn_bench.write_results(records, report, folder)
    print(targets_table([target for record in records for target in record.targets()]))


def measure_compiled(
    device: torch.device, deadline: float, red: set[str], folder: Path
) -> dict[str, Any]:
    """Everybody, those that torch.compile makes too, on SD 1.5 and SDXL while there is time.

    Compiling takes longer than measuring: it comes last, and no layer is begun near the deadline.
    """
    options = attn_bench.parse(["--device", device.type])
    field, absent = contenders(device)
    field = [contender for contender in field if contender.name not in red]
    records, rates = attn_bench.measure_all(
        problems(["sd15:4096", "sdxl:4096", "sd15:1024", "sd15:256", "sdxl:1024"], [4]),
        field, device, ["bfloat16"], SHORT, options, deadline - _COMPILED_SECONDS,
    )  # fmt: skip
    report = attn_bench.content(records, rates, absent, device, {"with_compiled": True})
    if records:
        attn_bench.write_results(records, report, folder / "compiled")
    return report


def measure_training(device: torch.device, deadline: float, folder: Path) -> dict[str, str]:
    """The short forms of the training benchmarks on SD 1.5; none is begun after `deadline`.

    One that fails is named with its reason, and the others are measured all the same.
    """
    # Not above: each process of the checks imports this file, and these import diffusers.
    import step_bench
    import subjects_bench

    found: dict[str, str] = {}
    for name, bench, more in (
        ("step_bench", step_bench, ["--models", "sd15"]),
        ("subjects_bench", subjects_bench, []),
    ):
        if time.monotonic() > deadline:
            found[name] = "left out for time"
            continue
        arguments = ["--quick", "--device", device.type, "--output", str(folder), *more]
        try:
            report = bench.run(bench.parse(arguments))
        except Exception as error:  # noqa: BLE001 - the operator's figures must not be lost with it
            found[name] = f"failed: {type(error).__name__}: {reason(error)}"
            print(f"{name} {found[name]}")
            continue
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        found[name] = f"{len(report['results'])} rows"
    return found


def _chosen_backends(device: torch.device) -> set[str]:
    """The contenders whose backends the layers of SD 1.5 and SDXL get by themselves here."""
    from sefi_fast.ops import AttentionInputs, choose_backend

    widths = {layer.head_dim for _, layer in layers_of("sd15") + layers_of("sdxl")}
    tensors = [torch.empty(1, 1, 1, width, device=device, dtype=torch.bfloat16) for width in widths]
    return {f"sefi-{choose_backend(AttentionInputs(x, x, x, x))}" for x in tensors}


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Build, check, and on a GPU with nothing red measure; the report and where it was written."""
    started = time.monotonic()
    built = build(options.no_build)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if gpu:
        # The time belongs to the GPU: the CPU is checked beside it.
        with ThreadPoolExecutor(1) as aside:
            beside = aside.submit(checks_of_cpu)
            checks = run_checks(device, options.small)
            checks = beside.result() + checks
    else:
        checks = run_checks(device, options.small)
    print(checks_table(checks))
    red = [check for check in checks if check.status == "failed"]
    folder = options.output or _ROOT / "benchmarks" / "results" / device_name(device)
    report: dict[str, Any] = {
        "benchmark": "gpu_suite",
        "device": device_name(device),
        "environment": environment(device),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "build": built,
        "results": [check._asdict() for check in checks],
        "red": len(red),
    }
    if not gpu:
        report["note"] = NO_GPU
    else:
        deadline = started + 60.0 * options.minutes
        wrong = {check.contender for check in red}
        report["note"] = (
            f"checks are red: {', '.join(sorted(wrong))} got no time"
            if wrong
            else "all checks passed; figures in attn_bench.csv and next to it"
        )
        # Written before what may break the process, and again with the rest.
        write_report(folder, report)
        before_training = deadline - _TRAINING_SECONDS
        measure_gpu(device, before_training, options.small, wrong, folder)
        if time.monotonic() < deadline and not options.small:
            kernels = [name for name in ("sefi-triton", "sefi-cuda") if name not in wrong]
            arguments = ["--output", str(folder), "--only", *kernels, "sdpa-cudnn"]
            kernel_times.run(kernel_times.parse(arguments), device)
            host_times.run(device, folder, wrong)
        # Training takes the backends that a call chooses: none if one of these is red.
        if _chosen_backends(device) & wrong:
            report["training"] = "a backend that training would take is red"
        else:
            report["training"] = measure_training(device, deadline, folder)
        if not options.small:
            measure_compiled(device, deadline, wrong, folder)
    report["seconds"] = round(time.monotonic() - started, 1)
    write_report(folder, report)
    return report, folder


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all checks passed (or no GPU and the CPU's passed), 1 when one is red."""
    report, folder = run(parse(arguments))
    print(report["note"])
    print(f"wrote {os.path.relpath(folder / 'gpu_suite.csv')}")
    return 1 if report["red"] else 0


if __name__ == "__main__":
    sys.exit(main())
