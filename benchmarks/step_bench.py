"""Time, memory and parts of one training step: sefi_fast, the method written plainly, its peer.

On CUDA sefi_fast's step is timed as it runs, as a replayed graph, and taken apart operation by
operation, which is slower.

python benchmarks/step_bench.py --quick
python benchmarks/step_bench.py --models sd15 --batches 1 4 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)
# The profiler that counts allocations reports its own start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import diffusers  # noqa: E402
import torch  # noqa: E402
from _measure import Effort  # noqa: E402
from _rates import device_name  # noqa: E402
from _report import environment, table, targets_table, time_text, write_report  # noqa: E402
from _step_models import FULL_WIDTH, Architecture, reduced  # noqa: E402
from _step_parts import PARTS  # noqa: E402
from _step_run import CONTENDERS, StepEntry, StepRecord, measure_steps  # noqa: E402
from attn_bench import DTYPES, choose_device  # noqa: E402
from tqdm import tqdm  # noqa: E402

from sefi_fast.utils.malloc import keep_freed_memory  # noqa: E402

FULL = Effort(20.0, 0.0, 9)
QUICK = Effort(2.0, 0.0, 3)
TICKS = 3 * len(CONTENDERS) + 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; what depends on the device is filled in by `run`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, smaller latents on a CPU")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on CUDA")
    parser.add_argument("--models", nargs="+", choices=list(FULL_WIDTH), default=list(FULL_WIDTH))
    parser.add_argument("--batches", nargs="+", type=int, default=[1], metavar="B")
    parser.add_argument("--seconds", type=float, help="seconds to time each contender for")
    parser.add_argument("--full-width", action="store_true", help="full width on a CPU too")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    if min(options.batches) < 1:
        parser.error(f"--batches {options.batches}: each must be at least 1")
    return options


def architectures(options: argparse.Namespace, device: torch.device) -> list[Architecture]:
    """Full width on CUDA, or where it is asked for; reduced width on a CPU."""
    chosen = [FULL_WIDTH[name] for name in options.models]
    if device.type == "cuda" or options.full_width:
        return chosen
    return [reduced(full, options.quick) for full in chosen]


def record_table(record: StepRecord) -> str:
    """Contenders of one architecture on a line each: time, memory, and milliseconds by part."""
    built = record.built
    title = (
        f"\n{built.name}, widths {'/'.join(map(str, built.widths))}, latent {built.latent}x"
        f"{built.latent}, batch {record.batch}, {record.dtype}: {built.note}"
    )
    head = ["contender", "loss", "step", "spread", "peak MiB", "held MiB", *PARTS]
    return f"{title}\n{table(head, [_cells(entry) for entry in record.entries])}"


def _cells(entry: StepEntry) -> list[str]:
    contender = entry.contender
    cells = [f"({contender.letter}) {contender.name}", "yes" if contender.with_loss else "no"]
    if entry.timing is None or entry.memory is None:
        return [*cells, entry.problem or "not measured"]
    return [
        *cells,
        time_text(entry.timing.median),
        f"{entry.timing.spread * 100:.0f}%",
        f"{entry.memory.peak / 2**20:.1f}",
        f"{entry.memory.held / 2**20:.1f}",
        *(f"{entry.parts[part] * 1e3:.1f}" for part in PARTS),
    ]


def measure_all(
    chosen: list[Architecture],
    batches: list[int],
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
) -> list[StepRecord]:
    """Every architecture at every batch, with a progress bar; each table is printed when known."""
    records = []
    with tqdm(total=len(chosen) * len(batches) * TICKS, unit="part", file=sys.stderr) as bar:

        def tick(what: str) -> None:
            bar.update()
            bar.set_description(what)

        for built in chosen:
            for batch in batches:
                record = measure_steps(built, batch, device, dtype, effort, tick)
                records.append(record)
                bar.write(record_table(record), file=sys.stdout)
    return records


def report_of(
    records: list[StepRecord], device: torch.device, settings: dict[str, Any]
) -> dict[str, Any]:
    """What goes into the files."""
    return {
        "benchmark": "step_bench",
        "device": device_name(device),
        "environment": environment(device),
        "settings": settings,
        "contenders": {c.name: f"({c.letter}) {c.what}" for c in CONTENDERS},
        "results": [row for record in records for row in record.rows()],
    }


def write_results(
    records: list[StepRecord], report: dict[str, Any], folder: Path, plots: bool = True
) -> list[Path]:
    """The report and, where matplotlib is, a PNG."""
    written = write_report(folder, report)
    drawable = [r for r in records if any(entry.timing is not None for entry in r.entries)]
    if not plots or not drawable:
        return written
    try:
        from _step_plot import plot_steps
    except ImportError:
        print("matplotlib is not installed: no PNG was written", file=sys.stderr)
        return written
    plot_steps(drawable, f"One training step, {report['device']}", folder / "step_bench.png")
    return [*written, folder / "step_bench.png"]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; returns what the files hold."""
    diffusers.utils.logging.set_verbosity_error()
    device = choose_device(options.device)
    name = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    effort = QUICK if options.quick else FULL
    if options.seconds is not None:
        effort = effort._replace(seconds=options.seconds)
    chosen = architectures(options, device)
    records = measure_all(chosen, options.batches, device, DTYPES[name], effort)
    settings = {
        "quick": options.quick,
        "dtype": name,
        "batches": options.batches,
        "seconds_a_contender": effort.seconds,
        "rounds_at_least": effort.rounds,
    }
    report = report_of(records, device, settings)
    print(targets_table([target for record in records for target in record.targets()]))
    folder = options.output or _ROOT / "benchmarks" / "results" / device_name(device)
    for path in write_results(records, report, folder, not options.no_plots):
        print(f"wrote {os.path.relpath(path)}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 when a step of sefi_fast's own was wrong, 2 for bad arguments."""
    keep_freed_memory()
    options = parse(arguments)
    try:
        report = run(options)
    except ValueError as error:
        print(f"step_bench: {error}", file=sys.stderr)
        return 2
    wrong = {
        row["contender"]
        for row in report["results"]
        if row["contender"].startswith("sefi") and row["verdict"] != "right"
    }
    if wrong:
        print(f"NO FIGURE from {', '.join(sorted(wrong))}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
