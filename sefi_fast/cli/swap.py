"""`sefi-fast swap`: keys from one prompt, values from another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sefi_fast.cli.options import add_sampling, attached_pipeline
from sefi_fast.cli.outputs import (
    check_pictures_folder,
    check_sheet,
    report,
    save_pictures,
    write_picture,
)
from sefi_fast.utils.files import user_path


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "swap", help="draw with the attention of one prompt and the content of another"
    )
    parser.add_argument("--key-prompt", help="gives the keys: where the picture looks")
    parser.add_argument("--value-prompt", help="gives the values: what it finds there")
    parser.add_argument(
        "--sheet", nargs="+", metavar="PROMPT",
        help="one sheet of every prompt's keys with every prompt's values",
    )  # fmt: skip
    add_sampling(parser)
    parser.add_argument(
        "-n", "--number", type=int, default=1, help="how many pictures (default: 1)"
    )
    parser.add_argument(
        "-o", "--output", type=user_path,
        help="folder for the PNG files (default: pictures); with --sheet the PNG file (swap.png)",
    )  # fmt: skip
    parser.set_defaults(run=_swap)


def _swap(options: argparse.Namespace) -> int:
    pair = [text for text in (options.key_prompt, options.value_prompt) if text is not None]
    if (options.sheet is None) == (not pair) or len(pair) == 1:
        raise ValueError(
            "give --key-prompt and --value-prompt, or --sheet with two prompts or more"
        )
    return _draw_pictures(options, pair) if options.sheet is None else _draw_sheet(options)


def _draw_pictures(options: argparse.Namespace, pair: list[str]) -> int:
    folder = Path("pictures") if options.output is None else options.output
    check_pictures_folder(options, folder)
    pipe, sampling = attached_pipeline(options, pair)
    from sefi_fast.pipelines import swap

    drawn = swap(pipe, key_prompt=pair[0], value_prompt=pair[1], n=options.number, **sampling)
    save_pictures(drawn, folder, options.seed)
    return 0


def _draw_sheet(options: argparse.Namespace) -> int:
    if len(options.sheet) < 2:
        raise ValueError("--sheet compares prompts: give two or more")
    if options.number != 1:
        raise ValueError("--sheet draws one picture a pair of prompts: leave --number out")
    path = Path("swap.png") if options.output is None else options.output
    check_sheet(options, path)
    pipe, sampling = attached_pipeline(options, options.sheet)
    from sefi_fast.evaluation import swap_sheet

    write_picture(path, swap_sheet(pipe, options.sheet, **sampling))
    report(path)
    return 0
