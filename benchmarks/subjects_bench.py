"""Subjects an hour against how many train side by side, and how well the device is used.

python benchmarks/subjects_bench.py --quick
python benchmarks/subjects_bench.py --model sd15 --lanes 1 8 32 --batch-size 1

The model is the bundled one on a CPU, and one of SD 1.5's sizes with random weights on CUDA.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass
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
from _measure import Effort, interleaved, interleaved_cuda, memory  # noqa: E402
from _rates import device_name, measured_rates  # noqa: E402
from _report import environment, table, time_text, write_report  # noqa: E402
from _step_models import FULL_WIDTH, random_pipeline  # noqa: E402
from _step_run import picture  # noqa: E402
from _training_flops import flop_counter  # noqa: E402
from attn_bench import DTYPES, choose_device  # noqa: E402
from tqdm import tqdm  # noqa: E402

from sefi_fast.tiny_world import CLASS_WORD  # noqa: E402
from sefi_fast.training import TrainConfig  # noqa: E402
from sefi_fast.training.base_model import BaseModel, training_session  # noqa: E402
from sefi_fast.training.subject_state import SubjectSpec  # noqa: E402
from sefi_fast.training.trainer import Run  # noqa: E402
from sefi_fast.utils.malloc import keep_freed_memory  # noqa: E402

LANES = (1, 2, 4, 8, 16, 32)
BUNDLED = "bundled"
FULL = Effort(20.0, 0.0, 7)
QUICK = Effort(2.0, 0.0, 3)
_PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Row:
    """One number of lanes.

    Attributes:
        seconds_a_step: of all lanes together, the median in turns with the other rows.
        seconds_to_prepare: a subject, from its image to the engine.
        subjects_an_hour: with all steps and the preparation.
        efficiency: subjects an hour over those of one lane.
        flops_a_step: of all products, counted by PyTorch and, in cross-attention, by their shapes.
        flops_share: of the rate of a large matrix product, measured in the same run.
        peak_bytes: that a step takes beyond what is held between steps.
    """

    lanes: int
    seconds_a_step: float
    spread: float
    seconds_to_prepare: float
    subjects_an_hour: float
    efficiency: float
    flops_a_step: int
    flops_share: float
    peak_bytes: int


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; what depends on the device is filled in by `run`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, at most 8 lanes")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on CUDA")
    parser.add_argument("--model", help="bundled, sd15 (random weights), or a diffusers folder")
    parser.add_argument("--class-word", default=CLASS_WORD, help="a word the model knows")
    parser.add_argument("--lanes", nargs="+", type=int, metavar="L")
    parser.add_argument("--steps", type=int, help="of a subject; default: the library's")
    parser.add_argument("--batch-size", type=int, help="of a subject; default: the library's")
    parser.add_argument("--resolution", type=int, help="default: the model's own")
    parser.add_argument("--seconds", type=float, help="seconds to time each number of lanes for")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    if options.lanes and min(options.lanes) < 1:
        parser.error(f"--lanes {options.lanes}: each must be at least 1")
    return options


def config_of(options: argparse.Namespace, device: torch.device, dtype: str) -> TrainConfig:
    """The library's defaults at a constant rate, with what the command line says."""
    given = {"steps": options.steps, "batch_size": options.batch_size}
    given["resolution"] = options.resolution
    return TrainConfig(
        schedule="constant",
        device=str(device),
        precision=_PRECISION[dtype],  # type: ignore[arg-type]
        checkpoint_every=0,
        **{name: value for name, value in given.items() if value is not None},
    )


def model_of(name: str, device: torch.device, dtype: str) -> Any:
    """What `sefi_fast.train` takes as its model."""
    if name == BUNDLED:
        return None
    if name in FULL_WIDTH and name == "sd15":
        return random_pipeline(FULL_WIDTH[name], device, DTYPES[dtype])
    return name


def jobs_of(count: int, class_word: str) -> list[SubjectSpec]:
    """Subjects that differ in their images and seeds."""
    pixels = (picture(64).permute(1, 2, 0).numpy() + 1) * 127.5
    shades = [pixels * (1 - 0.5 * number / count) for number in range(count)]
    return [
        SubjectSpec(shade.astype("uint8"), class_word, placeholder="<it>", seed=number)
        for number, shade in enumerate(shades)
    ]


def counted_flops(source: BaseModel, config: TrainConfig, jobs: list[SubjectSpec]) -> int:
    """Floating-point operations of the products of one step of all jobs."""
    plain = TrainConfig.from_overrides(config, {"capture": "never"})
    engine = Run(source, plain, jobs).engine
    assert engine is not None
    with flop_counter() as counter:
        engine.step()
    return counter.get_total_flops()


def measure_lanes(
    source: BaseModel, config: TrainConfig, lanes: list[int], class_word: str, effort: Effort
) -> tuple[list[Row], list[str]]:
    """A row a number of lanes, fewest first, and what did not fit the memory, in words."""
    device, dtype = source.device, str(source.dtype).removeprefix("torch.")
    rate = measured_rates(device, DTYPES[dtype], quick=True).flops
    one_flops = counted_flops(source, config, jobs_of(1, class_word))
    calls, prepared, peaks = {}, {}, {}
    notes: list[str] = []
    for count in tqdm(sorted(set(lanes)), unit="engine", file=sys.stderr):
        started = time.perf_counter()
        try:
            engine = Run(source, config, jobs_of(count, class_word)).engine
            assert engine is not None
            prepared[count] = (time.perf_counter() - started) / count
            step = engine.step
            peaks[count] = memory(lambda step=step: [step(), torch.empty(0)][1], device).peak
        except (MemoryError, torch.OutOfMemoryError) as error:
            notes.append(f"{count} side by side: {str(error).splitlines()[0]}")
            prepared.pop(count, None)
            break
        calls[str(count)] = step
    timings = (interleaved_cuda if device.type == "cuda" else interleaved)(calls, effort)
    rows: list[Row] = []
    for count in prepared:
        timing = timings[str(count)]
        hours = (config.steps * timing.median / count + prepared[count]) / 3600
        flops = one_flops * count
        rows.append(
            Row(
                lanes=count,
                seconds_a_step=timing.median,
                spread=timing.spread,
                seconds_to_prepare=prepared[count],
                subjects_an_hour=1 / hours,
                efficiency=1 / hours / (rows[0].subjects_an_hour if rows else 1 / hours),
                flops_a_step=flops,
                flops_share=flops / timing.median / rate,
                peak_bytes=peaks[count],
            )
        )
    return rows, notes


def rows_table(rows: list[Row]) -> str:
    """Every number of lanes on a line."""
    head = ["lanes", "step", "spread", "a subject a step", "prepare", "subjects/h", "x fewest"]
    head += ["GFLOP/step", "of matrix rate", "peak MiB"]
    cells = [
        [
            str(row.lanes),
            time_text(row.seconds_a_step),
            f"{row.spread * 100:.0f}%",
            time_text(row.seconds_a_step / row.lanes),
            time_text(row.seconds_to_prepare),
            f"{row.subjects_an_hour:.1f}",
            f"{row.efficiency:.2f}",
            f"{row.flops_a_step / 1e9:.1f}",
            f"{row.flops_share * 100:.0f}%",
            f"{row.peak_bytes / 2**20:.0f}",
        ]
        for row in rows
    ]
    return table(head, cells)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Subjects an hour and the share of the matrix rate over the lanes."""
    from _plots import save, style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    lanes = [row.lanes for row in rows]
    for axes, values, label in (
        (left, [row.subjects_an_hour for row in rows], "subjects an hour"),
        (right, [row.flops_share * 100 for row in rows], "% of a large product's rate"),
    ):
        axes.plot(lanes, values, "o-", color="#d1495b")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lanes, [str(count) for count in lanes])
        axes.set_xlabel("subjects side by side")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        style(axes)
    save(figure, path)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; returns what the files hold."""
    diffusers.utils.logging.set_verbosity_error()
    device = choose_device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    name = options.model or ("sd15" if device.type == "cuda" else BUNDLED)
    effort = QUICK if options.quick else FULL
    if options.seconds is not None:
        effort = effort._replace(seconds=options.seconds)
    lanes = options.lanes or [count for count in LANES if not options.quick or count <= 8]
    config = config_of(options, device, dtype)
    with training_session(model_of(name, device, dtype), config) as source:
        rows, notes = measure_lanes(source, config, lanes, options.class_word, effort)
    print(
        f"\n{name}, {config.steps} steps of {config.batch_size} noised copies a subject, {dtype}\n"
        + rows_table(rows)
    )
    for note in notes:
        print(f"no figure: {note}")
    report = {
        "benchmark": "subjects_bench",
        "device": device_name(device),
        "environment": environment(device),
        "settings": {
            "model": name if name in (BUNDLED, *FULL_WIDTH) else Path(name).name,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "resolution": config.resolution,
            "dtype": dtype,
            "seconds_a_row": effort.seconds,
        },
        "results": [asdict(row) for row in rows],
        "not_measured": notes,
    }
    folder = options.output or _ROOT / "benchmarks" / "results" / device_name(device)
    for path in write_results(rows, report, folder, not options.no_plots):
        print(f"wrote {os.path.relpath(path)}")
    return report


def write_results(
    rows: list[Row], report: dict[str, Any], folder: Path, plots: bool = True
) -> list[Path]:
    """The report and, where matplotlib is, a PNG."""
    written = write_report(folder, report)
    if plots and rows:
        try:
            title = f"{report['settings']['model']} model, {report['device']}"
            plot(rows, title, folder / "subjects_bench.png")
        except ImportError:
            print("matplotlib is not installed: no PNG was written", file=sys.stderr)
        else:
            written.append(folder / "subjects_bench.png")
    return written


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 for bad arguments."""
    keep_freed_memory()
    try:
        run(parse(arguments))
    except ValueError as error:
        print(f"subjects_bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
