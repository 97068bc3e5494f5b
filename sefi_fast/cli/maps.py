"""`sefi-fast maps`: draw where chosen words of a prompt look."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sefi_fast.cli.options import add_sampling, attached_pipeline


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("maps", help="draw where chosen words of a prompt look")
    add_sampling(parser)
    parser.add_argument("-w", "--words", nargs="+", required=True, help="words of the prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("maps.png"), help="the PNG file")
    parser.set_defaults(run=_maps)


def _maps(options: argparse.Namespace) -> int:
    from sefi_fast.evaluation import Panel, contact_sheet
    from sefi_fast.pipelines import generate, trace

    pipe, sampling = attached_pipeline(options)
    with trace(pipe, words=options.words) as traced:
        picture = generate(pipe, options.prompt, n=1, **sampling)[0]
    panels = [Panel(picture, options.prompt)]
    panels += [Panel(traced.overlay(picture, word), word) for word in options.words]
    contact_sheet([("", panels)], panel_size=256).save(options.output)
    print(options.output)
    return 0
