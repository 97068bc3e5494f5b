"""`sefi-fast generate`: make pictures from a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sefi_fast.cli.options import add_prompt, add_sampling, attached_pipeline, save_pictures


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("generate", help="make pictures from a prompt")
    add_prompt(parser)
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
    pictures = generate(pipe, options.prompt, n=options.number, **sampling)
    save_pictures(pictures, options.output, options.seed)
    return 0
