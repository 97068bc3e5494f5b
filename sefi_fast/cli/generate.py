"""`sefi-fast generate`, `maps` and `swap`."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sefi_fast.cli.options import (
    add_prompt,
    add_sampling,
    attached_pipeline,
    check_images_folder,
    check_sheet,
    report,
    save_images,
    write_image,
)
from sefi_fast.utils.files import user_path


def add(commands: Any) -> None:
    """Add the subcommands."""
    _add_generate(commands)
    _add_maps(commands)
    _add_swap(commands)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="make images from a prompt")
    add_prompt(parser)
    add_sampling(parser)
    parser.add_argument(
        "-r", "--region", nargs=2, action="append", default=[], metavar=("PROMPT", "BOX"),
        help="a prompt of its own for a part of the image: left,top,right,bottom from 0 to 1; "
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
    check_images_folder(options, options.output)
    pipe, sampling = attached_pipeline(options, prompts)
    from sefi_fast.pipelines import generate, regions

    with regions(pipe, boxes) if boxes else nullcontext():
        pictures = generate(pipe, options.prompt, n=options.number, **sampling)
    save_images(pictures, options.output, options.seed)
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


def _add_maps(commands: Any) -> None:
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
        # The trace holds one call of the pipeline, so all images are drawn in one.
        count = options.number
        pictures = generate(pipe, options.prompt, n=count, batch_size=count, **sampling)
    rows = []
    for index, picture in enumerate(pictures):
        panels = [Panel(picture, options.prompt)]
        panels += [Panel(traced.overlay(picture, word, index), word) for word in options.words]
        rows.append(("", panels))
    write_image(options.output, contact_sheet(rows, panel_size=256))
    report(options.output)
    return 0


def _add_swap(commands: Any) -> None:
    parser = commands.add_parser(
        "swap", help="draw with the attention of one prompt and the content of another"
    )
    parser.add_argument("--key-prompt", help="gives the keys: where the image looks")
    parser.add_argument("--value-prompt", help="gives the values: what it finds there")
    parser.add_argument(
        "--sheet", nargs="+", metavar="PROMPT",
        help="one sheet of every prompt's keys with every prompt's values",
    )  # fmt: skip
    add_sampling(parser)
    parser.add_argument("-n", "--number", type=int, default=1, help="how many images (default: 1)")
    parser.add_argument(
        "-o", "--output", type=user_path,
        help="folder for the PNG files (default: images); with --sheet the PNG file (swap.png)",
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
    check_images_folder(options, folder)
    pipe, sampling = attached_pipeline(options, pair)
    from sefi_fast.pipelines import swap

    drawn = swap(pipe, key_prompt=pair[0], value_prompt=pair[1], n=options.number, **sampling)
    save_images(drawn, folder, options.seed)
    return 0


def _draw_sheet(options: argparse.Namespace) -> int:
    if len(options.sheet) < 2:
        raise ValueError("--sheet compares prompts: give two or more")
    if options.number != 1:
        raise ValueError("--sheet draws one image a pair of prompts: leave --number out")
    path = Path("swap.png") if options.output is None else options.output
    check_sheet(options, path)
    pipe, sampling = attached_pipeline(options, options.sheet)
    from sefi_fast.evaluation import swap_sheet

    write_image(path, swap_sheet(pipe, options.sheet, **sampling))
    report(path)
    return 0
