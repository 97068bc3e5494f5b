"""Speed, memory and rates of the fused cross-attention against all other ways to compute it.

python benchmarks/attn_bench.py --quick
python benchmarks/attn_bench.py --shapes sd15 sdxl --batches 1 16 --dtype bfloat16
python benchmarks/attn_bench.py --plot-only benchmarks/results/nvidia-h200 --output docs/images
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from common.attn_run import (
    STEPS_PER_PROVIDER,
    both_rows,
    by_problem,
    is_noisy,
    measure,
    name_of,
    problem_table,
    targets,
)
from common.options import (
    DTYPES,
    bench_parser,
    choose_device,
    default_dtype,
    effort_of,
    exit_status,
)
from common.plots import plot_bars, plot_roofline, plot_speed
from common.providers import COMPILED, Provider, providers
from common.rates import device_name, faster, measured_rates
from common.report import Row, read_csv, targets_table, write_report
from common.roofline import Rates
from common.shapes import BATCHES, MODELS, QUICK_SHAPES, TEXT_TOKENS, Problem, problems
from common.timing import FULL, QUICK, Effort
from tqdm import tqdm


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `run` fills in what depends on the device (dtype, folder)."""
    parser = bench_parser(__doc__, quick="SD 1.5, batch 1, short rounds")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default by device")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="sd15, sd15:4096, 4096x40x8")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B")
    parser.add_argument("--keys", type=int, default=TEXT_TOKENS, help="text tokens, 1 to 256")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="providers, by start of name")
    parser.add_argument(
        "--no-compiled", action="store_true", help="leave out what torch.compile makes"
    )
    parser.add_argument("--minutes", type=float, help="begin no problem after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot-only", type=Path, metavar="FOLDER", help="redraw the plots of measured results"
    )
    return parser.parse_args(arguments)


def chosen_problems(options: argparse.Namespace, device: torch.device) -> list[Problem]:
    """Return the chosen problems; on CUDA the default includes the batch-8 shape with a target."""
    shapes = options.shapes or (QUICK_SHAPES if options.quick else list(MODELS))
    batches = options.batches or ((1,) if options.quick else BATCHES)
    chosen = problems(shapes, batches, options.keys)
    if device.type == "cuda" and not options.shapes and not options.batches:
        chosen += problems(["sd15:4096"], [8], options.keys)
    return chosen


def measure_all(
    chosen: list[Problem],
    found: list[Provider],
    device: torch.device,
    dtypes: list[str],
    effort: Effort,
    options: argparse.Namespace,
) -> tuple[list[Row], dict[str, Rates]]:
    """Measure every problem in every dtype; print each table as soon as it is known."""
    deadline = time.monotonic() + 60.0 * (options.minutes or float("inf"))
    rows: list[Row] = []
    rates: dict[str, Rates] = {}
    total = len(dtypes) * len(chosen) * len(found) * STEPS_PER_PROVIDER
    with tqdm(total=total, unit="step", smoothing=0.1, file=sys.stderr) as bar:
        for name in dtypes:
            bar.set_description("rates")
            rates[name] = now = measured_rates(device, DTYPES[name], options.quick)
            for problem in chosen:
                if time.monotonic() > deadline:
                    break
                bar.set_description(problem.name)
                if any(provider.family in COMPILED for provider in found):
                    # Each shape is compiled separately, not made dynamic.
                    torch._dynamo.reset()
                if device.type == "cpu":
                    # A CPU is shared: rates and times are compared, so they are measured together.
                    now = measured_rates(device, DTYPES[name], options.quick)
                    rates[name] = faster(rates[name], now)
                new = measure(
                    problem, found, device, DTYPES[name], now, effort, bar.update, options.seed
                )
                rows += new
                bar.write(problem_table(new), file=sys.stdout)
    return rows, rates


def plot(rows: list[Row], rates: dict[str, Rates], device: str, folder: Path) -> None:
    """Write a PNG of bars and one of the roofline for each dtype."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        if not any(both_rows(group) for group in by_problem(of_dtype)):
            continue
        title = f"Cross-attention, {dtype}, {device}"
        plot_bars(of_dtype, title, folder / f"attn_bench_{dtype}.png")
        plot_roofline(of_dtype, rates[dtype], title, folder / f"attn_bench_{dtype}_roofline.png")


def replot(options: argparse.Namespace) -> dict[str, Any]:
    """Redraw the plots of a folder of results; for a GPU draw the README's attn_bench.png too."""
    folder = options.plot_only
    rows = read_csv(folder / "attn_bench.csv")
    known = json.loads((folder / "environment.json").read_text())["attn_bench"]
    rates = {dtype: Rates(**values) for dtype, values in known["rates"].items()}
    plot(rows, rates, known["device"], folder)
    if gpu := known["environment"].get("gpu"):
        plot_speed(rows, gpu["name"], (options.output or folder) / "attn_bench.png")
    return {"results": rows}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the whole benchmark; return the content of its files."""
    device = choose_device(options.device)
    dtypes = options.dtype or [default_dtype(device)]
    effort = effort_of(options, FULL, QUICK)
    found, absent = providers(device, options.only)
    if options.quick:
        found = [provider for provider in found if provider.name != "sdpa-math"]
    if options.no_compiled:
        found = [provider for provider in found if provider.family not in COMPILED]
    chosen = chosen_problems(options, device)
    # Backward is timed on a kept forward pass, whose buffers must not be donated.
    torch._functorch.config.donated_buffer = False
    rows, rates = measure_all(chosen, found, device, dtypes, effort, options)
    groups = by_problem(rows)
    print(targets_table([one for group in groups for one in targets(group, device.type)]))
    if noisy := [name_of(group[0]) for group in groups if is_noisy(group)]:
        print(f"too noisy for a target, the machine was busy: {', '.join(noisy)}")
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    report = {
        "benchmark": "attn_bench",
        "settings": {
            "quick": options.quick,
            "dtypes": dtypes,
            "seconds_a_call": effort.seconds,
            "rounds_at_least": effort.rounds,
            "seed": options.seed,
            "tf32": device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        },
        "rates": {name: asdict(value) for name, value in rates.items()},
        "absent": absent,
        "results": rows,
    }
    folder = write_report(report, device, options.output)
    if not options.no_plots:
        plot(rows, rates, device_name(device), folder)
    return report


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status."""
    options = parse(arguments)
    return exit_status("attn_bench", lambda: replot(options) if options.plot_only else run(options))


if __name__ == "__main__":
    sys.exit(main())
