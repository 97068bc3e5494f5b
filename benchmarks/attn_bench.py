"""Speed, memory and rates of the fused cross-attention against every other way to compute it.

python benchmarks/attn_bench.py --quick
python benchmarks/attn_bench.py --shapes sd15 sdxl --batches 1 16 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)
# The profiler that counts allocations reports its own start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
from _contenders import COMPILED, Contender, contenders  # noqa: E402
from _measure import FULL, QUICK, Effort  # noqa: E402
from _rates import device_name, faster, measured_rates  # noqa: E402
from _record import ProblemRecord  # noqa: E402
from _report import environment, problem_table, targets_table, write_report  # noqa: E402
from _roofline import Rates  # noqa: E402
from _run import STEPS_PER_CONTENDER, measure  # noqa: E402
from _shapes import BATCHES, MODELS, QUICK_SHAPES, TEXT_TOKENS, Problem, problems  # noqa: E402
from tqdm import tqdm  # noqa: E402

from sefi_fast.utils.malloc import keep_freed_memory  # noqa: E402

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; what depends on the device (dtype, folder) is filled in by `run`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="SD 1.5, batch 1, short rounds")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default by device")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="sd15, sd15:4096, 4096x40x8")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B")
    parser.add_argument("--keys", type=int, default=TEXT_TOKENS, help="text tokens, 1 to 256")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders, by how names start")
    parser.add_argument("--seconds", type=float, help="seconds to time each call for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument("--no-plots", action="store_true")
    return parser.parse_args(arguments)


def choose_device(word: str | None) -> torch.device:
    """The device of a word, CUDA where there is one by default; ValueError if it is not there."""
    word = word or ("cuda" if torch.cuda.is_available() else "cpu")
    if word.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {word}: wanted cpu or cuda")
    device = torch.device(word)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    return device


def chosen_problems(options: argparse.Namespace, device: torch.device) -> list[Problem]:
    """The problems asked for; on CUDA the batch-8 shape that has a target comes with the rest."""
    shapes = options.shapes or (QUICK_SHAPES if options.quick else list(MODELS))
    batches = options.batches or ((1,) if options.quick else BATCHES)
    chosen = problems(shapes, batches, options.keys)
    if device.type == "cuda" and not options.shapes and not options.batches:
        chosen += problems(["sd15:4096"], [8], options.keys)
    return chosen


def measure_all(
    chosen: list[Problem],
    field: list[Contender],
    device: torch.device,
    dtypes: list[str],
    effort: Effort,
    options: argparse.Namespace,
    deadline: float = float("inf"),
) -> tuple[list[ProblemRecord], dict[str, Rates]]:
    """Every problem in every dtype, with a progress bar; each table is printed as it is known.

    No problem is begun after `deadline`, on the clock of time.monotonic.
    """
    records: list[ProblemRecord] = []
    rates: dict[str, Rates] = {}
    total = len(dtypes) * len(chosen) * len(field) * STEPS_PER_CONTENDER
    with tqdm(total=total, unit="step", smoothing=0.1, file=sys.stderr) as bar:

        def tick() -> None:
            bar.update()

        for name in dtypes:
            bar.set_description("rates")
            rates[name] = measured_rates(device, DTYPES[name], options.quick)
            for problem in chosen:
                if time.monotonic() > deadline:
                    break
                bar.set_description(problem.name)
                if any(contender.family in COMPILED for contender in field):
                    # Compiled afresh for each shape, not made dynamic.
                    torch._dynamo.reset()
                if device.type == "cpu":
                    # Near in time to what they are compared with, on a machine others use too.
                    now = measured_rates(device, DTYPES[name], options.quick)
                    rates[name] = faster(rates[name], now)
                else:
                    now = rates[name]
                record = measure(
                    problem,
                    field,
                    device,
                    DTYPES[name],
                    now,
                    effort,
                    tick=tick,
                    seed=options.seed,
                )
                records.append(record)
                bar.write(problem_table(record), file=sys.stdout)
    return records, rates


def content(
    records: list[ProblemRecord],
    rates: dict[str, Rates],
    absent: dict[str, str],
    device: torch.device,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What goes into the files: environment, ceilings, who was absent and why, rows."""
    return {
        "benchmark": "attn_bench",
        "device": device_name(device),
        "environment": environment(device),
        "settings": settings,
        "rates": {name: value.as_dict() for name, value in rates.items()},
        "absent": absent,
        "results": [row for record in records for row in record.rows()],
    }


def write_results(
    records: list[ProblemRecord], report: dict[str, Any], folder: Path, plots: bool = True
) -> list[Path]:
    """The report and, where matplotlib is, a bar and a roofline PNG a dtype."""
    written = write_report(folder, report)
    drawable = [
        record for record in records if any(entry.seconds("both") for entry in record.entries)
    ]
    if not plots or not drawable:
        return written
    try:
        import matplotlib  # noqa: F401
        from _plots import plot_bars, plot_roofline
    except ImportError:
        print("matplotlib is not installed: no PNG was written", file=sys.stderr)
        return written
    for dtype in dict.fromkeys(record.dtype for record in drawable):
        of_dtype = [record for record in drawable if record.dtype == dtype]
        title = f"Cross-attention, {dtype}, {report['device']}"
        bars_png = folder / f"attn_bench_{dtype}.png"
        roofline_png = folder / f"attn_bench_{dtype}_roofline.png"
        fastest = functools.reduce(faster, (record.rates for record in of_dtype))
        plot_bars(of_dtype, title, bars_png)
        plot_roofline(of_dtype, fastest, title, roofline_png)
        written += [bars_png, roofline_png]
    return written


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; returns what the files hold."""
    device = choose_device(options.device)
    dtypes = options.dtype or (["bfloat16"] if device.type == "cuda" else ["float32"])
    effort = QUICK if options.quick else FULL
    if options.seconds is not None:
        effort = effort._replace(seconds=options.seconds)
    field, absent = contenders(device, options.only)
    if options.quick:
        field = [contender for contender in field if contender.name != "sdpa-math"]
    chosen = chosen_problems(options, device)
    # Backward is timed on a kept forward pass, whose buffers must not be given away.
    torch._functorch.config.donated_buffer = False
    records, rates = measure_all(chosen, field, device, dtypes, effort, options)
    settings = {
        "quick": options.quick,
        "dtypes": dtypes,
        "seconds_a_call": effort.seconds,
        "rounds_at_least": effort.rounds,
        "seed": options.seed,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else False,
    }
    report = content(records, rates, absent, device, settings)
    print(targets_table([target for record in records for target in record.targets()]))
    noisy = [record.problem.name for record in records if record.noisy]
    if noisy:
        print(f"too noisy to hold to a target, the machine was busy: {', '.join(noisy)}")
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    folder = options.output or _ROOT / "benchmarks" / "results" / device_name(device)
    for path in write_results(records, report, folder, not options.no_plots):
        print(f"wrote {os.path.relpath(path)}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 when a contender of sefi's own was wrong, 2 for bad arguments."""
    keep_freed_memory()
    try:
        report = run(parse(arguments))
    except ValueError as error:
        print(f"attn_bench: {error}", file=sys.stderr)
        return 2
    wrong = {
        row["contender"]
        for row in report["results"]
        if row["contender"].startswith("sefi-") and row["verdict"].startswith("wrong")
    }
    if wrong:
        print(f"WRONG results from {', '.join(sorted(wrong))}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
