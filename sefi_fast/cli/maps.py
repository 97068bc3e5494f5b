"""`sefi-fast maps`: draw where chosen words of a prompt look."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sefi_fast.cli.options import add_prompt, add_sampling, attached_pipeline
from sefi_fast.cli.outputs import check_sheet, report, write_picture
from sefi_fast.utils.files import user_path


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("maps", help="draw where chosen words of a prompt look")
    add_prompt(parser)
    add_sampling(parser)
    parser.add_argument("-w", "--words", nargs="+", required=True, help="words of the prompt")
    parser.add_argument("-n", "--number", type=int, default=1, help="how many (default: 1)")
    parser.add_argument(
        "-o", "--output", type=user_path, default=Path("maps.png"), help="the PNG file"
    )
    parser.set_defaults(run=_maps)


def _maps(options: argparse.Namespace) -> int:
    check_sheet(options, options.output)
    pipe, sampling = attached_pipeline(options)
    from sefi_fast.evaluation import Panel, contact_sheet
    from sefi_fast.pipelines import generate, trace

    with trace(pipe, words=options.words) as traced:
        # The trace holds one call of the pipeline, so all pictures are drawn in one.
        count = options.number
        pictures = generate(pipe, options.prompt, n=count, batch_size=count, **sampling)
    rows = []
    for index, picture in enumerate(pictures):
        panels = [Panel(picture, options.prompt)]
        panels += [Panel(traced.overlay(picture, word, index), word) for word in options.words]
        rows.append(("", panels))
    write_picture(options.output, contact_sheet(rows, panel_size=256))
    report(options.output)
    return 0
