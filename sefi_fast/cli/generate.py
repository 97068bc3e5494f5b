"""`sefi-fast generate`: make pictures from a prompt."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sefi_fast.cli.options import add_prompt, add_sampling, attached_pipeline
from sefi_fast.cli.outputs import check_pictures_folder, save_pictures
from sefi_fast.utils.files import user_path


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("generate", help="make pictures from a prompt")
    add_prompt(parser)
    add_sampling(parser)
    parser.add_argument(
        "-r", "--region", nargs=2, action="append", default=[], metavar=("PROMPT", "BOX"),
        help="a prompt of its own for a part of the picture: left,top,right,bottom from 0 to 1; "
        "may be given several times, where two overlap the later one counts",
    )  # fmt: skip
    parser.add_argument("-n", "--number", type=int, default=4, help="how many (default: 4)")
    parser.add_argument(
        "-o", "--output", type=user_path, default=Path("pictures"), help="folder for the PNG files"
    )
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    boxes = [(prompt, _box(box)) for prompt, box in options.region]
    prompts = [options.prompt, *(prompt for prompt, _ in boxes)]
    check_pictures_folder(options, options.output)
    pipe, sampling = attached_pipeline(options, prompts)
    from sefi_fast.pipelines import generate, regions

    with regions(pipe, boxes) if boxes else nullcontext():
        pictures = generate(pipe, options.prompt, n=options.number, **sampling)
    save_pictures(pictures, options.output, options.seed)
    return 0


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"the box {text!r} must be four numbers with commas between: left,top,right,bottom, "
            "from 0 to 1"
        ) from None
    return left, top, right, bottom
