"""`sefi-fast demo`: personalise the bundled model; no download, no GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sefi_fast.cli.outputs import check_kept, report
from sefi_fast.demo import FILES
from sefi_fast.host_memory import keep_freed_memory_on_cpu
from sefi_fast.training.output import check_folder
from sefi_fast.utils.files import user_path


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "demo", help="personalise the bundled model on a bundled picture; no download, no GPU"
    )
    parser.add_argument("--image", type=user_path, help="another picture than the bundled one")
    parser.add_argument(
        "-o",
        "--output",
        type=user_path,
        default=Path("sefi_fast_demo"),
        help="folder for the pictures",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps (default: the library's)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    check_folder(options.output, make=False)
    check_kept((options.output / name for name in FILES.values()), [options.image])
    from sefi_fast.demo import run_demo

    keep_freed_memory_on_cpu()
    overrides = {} if options.steps is None else {"steps": options.steps}
    result = run_demo(options.output, image=options.image, seed=options.seed, **overrides)
    report(f"{result.sheet}: the subject in new scenes and with accessories")
    report(f"{result.maps}: where the words looked")
    report(f"{result.curves}: the training curves")
    report(f"{result.subject}: the subject, to attach to the bundled model")
    report(f"done in {result.seconds:.0f} s")
    return 0
