"""Tries launch configurations and prints lines for the table in kernels/configs.py.

    python benchmarks/tune_kernels.py --jobs 8    # on a CUDA device: checks, then times

Nothing is changed by it, and no training or generation ever starts it: the lines are for pasting.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)

import _tuning  # noqa: E402
from _report import environment, write_report  # noqa: E402
from _tuning import Place, Trial, Winner, as_code  # noqa: E402
from tqdm import tqdm  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = (48, 64, 80, 160)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the tuner."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=_tuning.KERNELS, default=_tuning.KERNELS)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--widths", nargs="+", type=int, default=list(WIDTHS), metavar="D",
        choices=(*WIDTHS, 256), help="upper ends of the table's head width buckets",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="compiling processes")
    parser.add_argument("--output", type=Path, help="folder for everything that was tried")
    return parser.parse_args(arguments)


def places(options: argparse.Namespace, capability: int) -> Iterator[Place]:
    """Every place of the table asked for that some head width can reach."""
    import torch

    dtype = getattr(torch, options.dtype)
    for kernel in options.kernels:
        for width in options.widths:
            place = Place(kernel, capability, _tuning.precision_of(dtype), width)
            if _tuning.problems_of(place, dtype):
                yield place


def trials_of(place: Place) -> list[Trial]:
    """All candidates of a place, the default first."""
    return [Trial(place, config, i == 0) for i, config in enumerate(_tuning.candidates(place))]


def teller(bar: tqdm[Any]) -> Callable[[Trial], None]:
    """Moves the bar for each run of a trial, and names a trial that was dropped, once."""
    named: set[tuple[Place, Any]] = set()

    def tell(trial: Trial) -> None:
        place = trial.place
        where = f"sm_{place.capability} {place.kernel} width {place.width}"
        bar.set_description(where)
        bar.update()
        if trial.dropped is not None and (place, trial.config) not in named:
            named.add((place, trial.config))
            bar.write(f"dropped: {where}, {as_code(trial.config)}: {trial.dropped}", sys.stderr)

    return tell


def save(options: argparse.Namespace, trials: list[Trial], winners: list[Winner]) -> None:
    """Write everything that was tried to the folder asked for, if one was."""
    import torch

    if not options.output:
        return
    report = {
        "benchmark": "tune_kernels",
        "dtype": options.dtype,
        "environment": environment(torch.device("cuda")),
        "lines": list(_tuning.table_lines(winners)),
        "results": [row for trial in trials for row in trial.rows()],
    }
    write_report(options.output, report)


def tune_device(options: argparse.Namespace) -> tuple[list[Trial], list[Winner]]:
    """Check and time all candidates on this machine's CUDA device."""
    import torch
    from _tuning_device import compile_all, measure_place
    from sefi_fast.kernels import Device

    from sefi_fast.ops.dispatch import cuda_device

    found = cuda_device(torch.cuda.current_device())
    device = Device(found.capability, found.multiprocessors, False)
    dtype = getattr(torch, options.dtype)
    groups = [
        (trials_of(place), _tuning.problems_of(place, dtype))
        for place in places(options, found.capability)
    ]
    if options.jobs > 1:
        with tqdm(total=sum(len(trials) for trials, _ in groups), unit="kernel") as bar:
            compile_all(groups, dtype, device, options.jobs, bar.update)
    winners: list[Winner] = []
    tried: list[Trial] = []
    total = sum(len(trials) * len(problems) for trials, problems in groups)
    with tqdm(total=total, unit="run") as bar:
        tell = teller(bar)
        for trials, problems in groups:
            winner = measure_place(trials, problems, dtype, device, tell)
            winners += [winner] if winner else []
            tried += trials
            # After each place: a run that is cut short keeps what it found.
            save(options, tried, winners)
            torch.cuda.empty_cache()
    return tried, winners


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 2 where there is no CUDA device."""
    options = parse(arguments)
    # Interpreting would prevent compiling, in the workers too; Triton reads both late.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import torch

    if not torch.cuda.is_available():
        print("tune_kernels: no CUDA device on this machine: times need one", file=sys.stderr)
        return 2
    trials, winners = tune_device(options)
    save(options, trials, winners)
    if not winners:
        print("no candidate is better than the defaults")
    for line in _tuning.table_lines(winners):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
