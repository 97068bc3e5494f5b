"""Time, memory and parts of one training step: sefi_fast, the method written plainly, its peer.

On CUDA sefi_fast's step is timed as a replayed graph, as it is used. Its parts are measured
operation by operation, which is slower.

python benchmarks/step_bench.py --quick
python benchmarks/step_bench.py --models sd15 --batches 1 4 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import diffusers
import torch
from common.attn_run import MOST_SPREAD
from common.models import FULL_WIDTH, Architecture, random_pipeline, reduced
from common.options import (
    DTYPES,
    PRECISION,
    bench_parser,
    choose_device,
    default_dtype,
    effort_of,
    exit_status,
)
from common.plots import plot_steps
from common.rates import device_name
from common.report import Row, Target, reason, table, targets_table, time_text, write_report
from common.step_profile import PARTS, memory_of, profile_step
from common.step_providers import PlainStep, SefiStep, TextualInversionStep, training_image
from common.timing import Effort, interleaved_on
from torch import Tensor
from tqdm import tqdm

from sefi_fast.training import TrainConfig

SEFI, PLAIN, INVERSION, NO_LOSS = "sefi", "plain-maps", "textual-inversion", "sefi-no-loss"
FULL = Effort(20.0, 0.0, 9)
QUICK = Effort(2.0, 0.0, 3)

_CHECKED_STEPS = 3
# Largest relative differences of noise loss and subject loss between sefi and plain-maps. The first
# updates of AdamW are signs, which rounding flips where a gradient is nearly zero.
_TOLERANCES = {"float32": (1e-3, 0.05), "bfloat16": (0.05, 0.5), "float16": (0.05, 0.5)}


class StepProvider(NamedTuple):
    """One way to train a step."""

    name: str
    what: str
    with_loss: bool
    make: Callable[[Any, TrainConfig, Tensor, torch.dtype], Any]


PROVIDERS = (
    StepProvider(SEFI, "sefi_fast with the subject-wise attention loss", True, SefiStep),
    StepProvider(
        PLAIN, "the same method on diffusers' parts, cross-attention maps in memory", True,
        PlainStep,
    ),
    StepProvider(
        INVERSION,
        "Textual Inversion as in diffusers' examples: image and prompt encoded each step, whole "
        "token tables in AdamW", False, TextualInversionStep,
    ),
    StepProvider(NO_LOSS, "sefi_fast without the loss", False, SefiStep),
)  # fmt: skip
TICKS = 3 * len(PROVIDERS) + 1


@dataclass
class Entry:
    """One provider on one architecture, and its figures if it passed its check."""

    provider: StepProvider
    losses: list[tuple[float, float]] = field(default_factory=list)
    """(noise loss, subject loss) of the first steps."""
    status: str = "pass"
    figures: Row = field(default_factory=dict)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `run` fills in what depends on the device."""
    parser = bench_parser(__doc__, quick="few rounds, smaller latents on a CPU")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on CUDA")
    parser.add_argument("--models", nargs="+", choices=list(FULL_WIDTH), default=list(FULL_WIDTH))
    parser.add_argument("--batches", nargs="+", type=int, default=[1], metavar="B")
    parser.add_argument("--full-width", action="store_true", help="full width on a CPU too")
    options = parser.parse_args(arguments)
    if min(options.batches) < 1:
        parser.error(f"--batches {options.batches}: each must be at least 1")
    return options


def make_step(
    provider: StepProvider,
    built: Architecture,
    batch: int,
    device: torch.device,
    dtype: str,
    capture: str = "auto",
) -> tuple[Any, Any]:
    """Return a provider's step and its pipeline, with the library's defaults at a constant rate."""
    pipe = random_pipeline(built, device, DTYPES[dtype])
    overrides = {"batch_size": batch, "precision": PRECISION[dtype], "capture": capture}
    overrides |= {"schedule": "constant"} | ({} if provider.with_loss else {"weight_lambda": 0.0})
    config = TrainConfig.from_overrides(overrides=overrides)
    return provider.make(pipe, config, training_image(8 * built.latent), DTYPES[dtype]), pipe


def measure_steps(
    built: Architecture,
    batch: int,
    device: torch.device,
    dtype: str,
    effort: Effort,
    tick: Callable[[str], object] = lambda _: None,
    providers: Sequence[StepProvider] = PROVIDERS,
) -> list[Entry]:
    """Check, time alternately, time parts, then measure memory with each provider alone.

    A provider that fails its check gets no figures.
    """
    entries = list(map(Entry, providers))
    ready: dict[str, tuple[Any, Any]] = {}
    for entry in entries:
        name = entry.provider.name
        tick(f"{name}: check")
        try:
            ready[name] = make_step(entry.provider, built, batch, device, dtype)
            entry.losses = [ready[name][0]() for _ in range(_CHECKED_STEPS)]
        except Exception as error:  # noqa: BLE001 - a library may raise anything; the row says what
            state = "fail" if entry.provider.make is SefiStep else "not run"
            entry.status = f"{state}: {reason(error)}"
            ready.pop(name, None)
    _compare_losses(entries, dtype)
    passed = [entry for entry in entries if entry.status == "pass"]
    tick("times")
    calls = {entry.provider.name: ready[entry.provider.name][0] for entry in passed}
    times = interleaved_on(device, calls, effort)
    calls.clear()
    for entry in passed:
        name = entry.provider.name
        tick(f"{name}: parts")
        step, pipe = ready.pop(name)
        if device.type == "cuda" and isinstance(step, SefiStep):
            step, pipe = make_step(entry.provider, built, batch, device, dtype, capture="never")
            step()
        parts = profile_step(step, pipe, device, repeats=max(2, effort.rounds // 2))
        del step, pipe
        entry.figures = {
            "seconds": times[name].median,
            "fastest_seconds": times[name].fastest,
            "spread": times[name].spread,
            "rounds": times[name].rounds,
            **{f"seconds_{part}": seconds for part, seconds in parts.items()},
        }
    ready.clear()
    for entry in passed:
        tick(f"{entry.provider.name}: memory")

        def build(provider: StepProvider = entry.provider) -> Any:
            return make_step(provider, built, batch, device, dtype)[0]

        memory = memory_of(build, device)
        entry.figures |= {"held_bytes": memory.held, "peak_bytes": memory.peak}
    return entries


def _compare_losses(entries: list[Entry], dtype: str) -> None:
    """Set the status: losses are finite, and those of sefi are those of the plain step."""
    for entry in entries:
        if not all(map(math.isfinite, sum(entry.losses, ()))):
            entry.status = f"fail: its losses are {entry.losses}"
    passed = {entry.provider.name: entry for entry in entries if entry.status == "pass"}
    ours, plain, no_loss = map(passed.get, (SEFI, PLAIN, NO_LOSS))
    if ours is None or plain is None:
        return
    noise_off, subject_loss_off = _TOLERANCES[dtype]
    for mine, other in zip(ours.losses, plain.losses, strict=True):
        if not (
            math.isclose(mine[0], other[0], rel_tol=noise_off)
            and math.isclose(mine[1], other[1], rel_tol=subject_loss_off, abs_tol=1e-6)
        ):
            ours.status = f"fail: noise loss and subject loss {mine}, of the plain step {other}"
    if no_loss and not math.isclose(no_loss.losses[0][0], plain.losses[0][0], rel_tol=noise_off):
        no_loss.status = "fail: its noise loss is not the plain step's"


def rows_of(entries: Sequence[Entry], built: Architecture, batch: int, dtype: str) -> list[Row]:
    """Return one flat row a provider."""
    return [
        {
            "model": built.name,
            "note": built.note,
            "latent": built.latent,
            "widths": "x".join(map(str, built.widths)),
            "batch": batch,
            "dtype": dtype,
            "provider": entry.provider.name,
            "what": entry.provider.what,
            "with_loss": entry.provider.with_loss,
            "status": entry.status,
            **entry.figures,
        }
        for entry in entries
    ]


def targets(rows: Sequence[Row], device_type: str) -> list[Target]:
    """Return speed against the plain method and Textual Inversion, memory against the latter.

    Without speeds where times scatter too widely.
    """
    by_name = {row["provider"]: row for row in rows if "seconds" in row}
    if SEFI not in by_name:
        return []
    ours, problem = by_name[SEFI], f"{rows[0]['model']} b{rows[0]['batch']}"
    noisy = any(row["spread"] > MOST_SPREAD for row in by_name.values())
    found: list[Target] = []
    for what, name, least in (
        ("times the plain method's speed", PLAIN, 3.0 if device_type == "cuda" else 1.0),
        ("times Textual Inversion's speed", INVERSION, 1.0),
    ):
        if name in by_name and not noisy:
            found.append((problem, what, by_name[name]["seconds"] / ours["seconds"], least))
    if INVERSION in by_name:
        less = by_name[INVERSION]["peak_bytes"] / ours["peak_bytes"]
        found.append((problem, "times less peak memory than Textual Inversion", less, 1.0))
    return found


def rows_table(rows: Sequence[Row]) -> str:
    """Return a line a provider: time, memory, and milliseconds by part."""
    lines = []
    for row in rows:
        line = [row["provider"], "yes" if row["with_loss"] else "no"]
        if row["status"] != "pass":
            lines.append([*line, row["status"]])
            continue
        line += [time_text(row["seconds"]), f"{row['spread'] * 100:.0f}%"]
        line += [f"{row[f'{name}_bytes'] / 2**20:.1f}" for name in ("peak", "held")]
        lines.append([*line, *(f"{row[f'seconds_{part}'] * 1e3:.1f}" for part in PARTS)])
    first = rows[0]
    title = (
        f"\n{first['model']}, widths {first['widths']}, latent {first['latent']}, "
        f"batch {first['batch']}, {first['dtype']}: {first['note']}"
    )
    head = ["provider", "loss", "step", "spread", "peak MiB", "held MiB", *PARTS]
    return f"{title}\n{table(head, lines)}"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the whole benchmark; return the content of its files."""
    diffusers.utils.logging.set_verbosity_error()
    device = choose_device(options.device)
    dtype = options.dtype or default_dtype(device)
    effort = effort_of(options, FULL, QUICK)
    chosen = [FULL_WIDTH[name] for name in options.models]
    if device.type == "cpu" and not options.full_width:
        chosen = [reduced(full, options.quick) for full in chosen]
    rows: list[Row] = []
    found: list[Target] = []
    with tqdm(total=len(chosen) * len(options.batches) * TICKS, file=sys.stderr) as bar:

        def tick(what: str) -> None:
            bar.update()
            bar.set_description(what)

        for built in chosen:
            for batch in options.batches:
                entries = measure_steps(built, batch, device, dtype, effort, tick)
                new = rows_of(entries, built, batch, dtype)
                bar.write(rows_table(new), file=sys.stdout)
                rows += new
                found += targets(new, device.type)
    print(targets_table(found))
    report = {
        "benchmark": "step_bench",
        "settings": {
            "quick": options.quick,
            "dtype": dtype,
            "batches": options.batches,
            "seconds_a_provider": effort.seconds,
            "rounds_at_least": effort.rounds,
        },
        "providers": {provider.name: provider.what for provider in PROVIDERS},
        "results": rows,
    }
    folder = write_report(report, device, options.output)
    if not options.no_plots and any("seconds" in row for row in rows):
        plot_steps(rows, f"One training step, {device_name(device)}", folder / "step_bench.png")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status."""
    options = parse(arguments)
    return exit_status("step_bench", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
