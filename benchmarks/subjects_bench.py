"""Subjects per hour against the subjects trained together, and the use of the device.

python benchmarks/subjects_bench.py --quick
python benchmarks/subjects_bench.py --model sd15 --batch-subjects 1 8 32 --batch-size 1

The model is the bundled one on a CPU, and SD 1.5 with random weights on CUDA.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from common.flop_counter import flop_counter
from common.models import SD15, random_pipeline
from common.options import (
    DTYPES,
    PRECISION,
    bench_parser,
    choose_device,
    default_dtype,
    effort_of,
    exit_status,
)
from common.plots import plot_subjects
from common.rates import device_name, measured_rates
from common.report import Row, reason, table, time_text, write_report
from common.step_providers import training_image
from common.timing import Effort, interleaved_on, memory
from tqdm import tqdm

from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training import TrainConfig
from sefi_fast.training.base_model import BaseModel, training_session
from sefi_fast.training.subject_state import SubjectSpec
from sefi_fast.training.trainer import Run

COUNTS = (1, 2, 4, 8, 16, 32)
BUNDLED = "bundled"
FULL = Effort(20.0, 0.0, 7)
QUICK = Effort(2.0, 0.0, 3)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `run` fills in what depends on the device."""
    parser = bench_parser(__doc__, quick="few rounds, at most 8 subjects")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on CUDA")
    parser.add_argument("--model", help="bundled, sd15 (random weights), or a diffusers folder")
    parser.add_argument("--class-word", default=CLASS_WORD, help="a word the model knows")
    parser.add_argument("--batch-subjects", nargs="+", type=int, metavar="N", help="counts to try")
    parser.add_argument("--steps", type=int, help="of a subject; default: the library's")
    parser.add_argument("--batch-size", type=int, help="of a subject; default: the library's")
    parser.add_argument("--resolution", type=int, help="default: the model's own")
    options = parser.parse_args(arguments)
    if options.batch_subjects and min(options.batch_subjects) < 1:
        parser.error(f"--batch-subjects {options.batch_subjects}: each must be at least 1")
    return options


def jobs_of(count: int, class_word: str) -> list[SubjectSpec]:
    """Return subjects that differ in their images and seeds."""
    pixels = (training_image(64).permute(1, 2, 0).numpy() + 1) * 127.5
    shades = [pixels * (1 - 0.5 * number / count) for number in range(count)]
    return [
        SubjectSpec(shade.astype("uint8"), class_word, placeholder="<it>", seed=number)
        for number, shade in enumerate(shades)
    ]


def counted_flops(source: BaseModel, config: TrainConfig, jobs: list[SubjectSpec]) -> int:
    """Count the floating-point operations of the products of one step of all jobs."""
    plain = TrainConfig.from_overrides(config, {"capture": "never"})
    engine = Run(source, plain, jobs).engine
    assert engine is not None
    with flop_counter() as counter:
        engine.step()
    return counter.get_total_flops()


def measure(
    source: BaseModel, config: TrainConfig, counts: list[int], class_word: str, effort: Effort
) -> tuple[list[Row], list[str]]:
    """Return a row a number of subjects, fewest first, and those that did not fit the memory.

    Times are of all subjects together. Efficiency compares subjects per hour with the fewest's;
    flops_share is of the rate of a large matrix product, measured in the same run; peak_bytes is
    what a step takes in addition to what is held between steps.
    """
    device, dtype = source.device, str(source.dtype).removeprefix("torch.")
    rate = measured_rates(device, DTYPES[dtype], quick=True).flops
    one_flops = counted_flops(source, config, jobs_of(1, class_word))
    calls: dict[str, Callable[[], Any]] = {}
    prepared: dict[int, float] = {}
    peaks: dict[int, int] = {}
    notes: list[str] = []
    for count in tqdm(sorted(set(counts)), unit="engine", file=sys.stderr):
        started = time.perf_counter()
        try:
            engine = Run(source, config, jobs_of(count, class_word)).engine
            assert engine is not None
            seconds = (time.perf_counter() - started) / count
            step: Callable[[], Any] = engine.step
            peaks[count] = memory(step, device).peak
        except (MemoryError, torch.OutOfMemoryError) as error:
            notes.append(f"{count} subjects: {reason(error)}")
            break
        prepared[count], calls[str(count)] = seconds, step
    timings = interleaved_on(device, calls, effort)
    rows: list[Row] = []
    for count, seconds in prepared.items():
        timing = timings[str(count)]
        an_hour = 3600 / (config.steps * timing.median / count + seconds)
        rows.append(
            {
                "batch_subjects": count,
                "seconds_a_step": timing.median,
                "spread": timing.spread,
                "seconds_to_prepare": seconds,
                "subjects_an_hour": an_hour,
                "efficiency": an_hour / (rows[0]["subjects_an_hour"] if rows else an_hour),
                "flops_a_step": one_flops * count,
                "flops_share": one_flops * count / timing.median / rate,
                "peak_bytes": peaks[count],
            }
        )
    return rows, notes


def rows_table(rows: list[Row]) -> str:
    """Return a line a number of subjects."""
    head = ["subjects", "step", "spread", "a subject a step", "prepare", "subjects/h", "x fewest"]
    head += ["GFLOP/step", "of matrix rate", "peak MiB"]
    cells = [
        [
            str(row["batch_subjects"]),
            time_text(row["seconds_a_step"]),
            f"{row['spread'] * 100:.0f}%",
            time_text(row["seconds_a_step"] / row["batch_subjects"]),
            time_text(row["seconds_to_prepare"]),
            f"{row['subjects_an_hour']:.1f}",
            f"{row['efficiency']:.2f}",
            f"{row['flops_a_step'] / 1e9:.1f}",
            f"{row['flops_share'] * 100:.0f}%",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    return table(head, cells)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the whole benchmark; return the content of its files."""
    diffusers.utils.logging.set_verbosity_error()
    device = choose_device(options.device)
    dtype = options.dtype or default_dtype(device)
    name = options.model or ("sd15" if device.type == "cuda" else BUNDLED)
    model: Any = None if name == BUNDLED else name
    if name == "sd15":
        model = random_pipeline(SD15, device, DTYPES[dtype])
    overrides = {
        "schedule": "constant",
        "device": str(device),
        "precision": PRECISION[dtype],
        "checkpoint_every": 0,
    }
    for setting in ("steps", "batch_size", "resolution"):
        if (value := getattr(options, setting)) is not None:
            overrides[setting] = value
    config = TrainConfig.from_overrides(overrides=overrides)
    effort = effort_of(options, FULL, QUICK)
    counts = options.batch_subjects or [n for n in COUNTS if n <= 8 or not options.quick]
    with training_session(model, config) as source:
        rows, notes = measure(source, config, counts, options.class_word, effort)
    title = f"{name}, {config.steps} steps, batch size {config.batch_size}, {dtype}"
    print(f"\n{title}\n{rows_table(rows)}")
    for note in notes:
        print(f"no figure: {note}")
    report: dict[str, Any] = {
        "benchmark": "subjects_bench",
        "settings": {
            "model": name if name in (BUNDLED, "sd15") else Path(name).name,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "resolution": config.resolution,
            "dtype": dtype,
            "seconds_a_row": effort.seconds,
        },
        "not_measured": notes,
        "results": rows,
    }
    folder = write_report(report, device, options.output)
    if rows and not options.no_plots:
        title = f"{report['settings']['model']} model, {device_name(device)}"
        plot_subjects(rows, title, folder / "subjects_bench.png")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status."""
    options = parse(arguments)
    return exit_status("subjects_bench", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
