"""`sefi-fast generate`: make pictures from a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sefi_fast.cli.options import add_sampling, attached_pipeline


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("generate", help="make pictures from a prompt")
    add_sampling(parser)
    parser.add_argument("-n", "--number", type=int, default=4, help="how many (default: 4)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("pictures"), help="folder for the PNG files"
    )
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    from sefi_fast.pipelines import generate

    if options.number < 1:
        raise ValueError(f"--number is {options.number}: give 1 or more")
    pipe, sampling = attached_pipeline(options)
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = generate(pipe, options.prompt, n=options.number, **sampling)
    for index, picture in enumerate(pictures):
        path = options.output / f"{options.seed + index:05d}.png"
        picture.save(path)
        print(path)
    return 0
