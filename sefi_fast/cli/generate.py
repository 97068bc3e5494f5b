"""`sefi-fast generate`, `maps` and `swap`."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from sefi_fast.cli.options import (
    Commands,
    add_sampling,
    attached_pipeline,
    check_images_folder,
    check_sheet,
    report,
    save_images,
    write_image,
)
from sefi_fast.utils.files import user_path

_PROMPT = "the prompt, with each subject's placeholder"
_IMAGES = Path("images")


def add(commands: Commands) -> None:
    parser = commands.add_parser("generate", help="generate images from a prompt")
    parser.add_argument("prompt", help=_PROMPT)
    add_sampling(parser, number=4)
    parser.add_argument(
        "-r", "--region", nargs=2, action="append", default=[], metavar=("PROMPT", "BOX"),
        help="a prompt for a part of the image, and its box: left,top,right,bottom from 0 to 1; "
        "may be repeated; where boxes overlap, the later one counts",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=user_path, default=_IMAGES,
        help=f"folder for the PNG files (default: {_IMAGES})",
    )  # fmt: skip
    parser.set_defaults(run=_generate)

    parser = commands.add_parser("maps", help="show the attention to chosen words of a prompt")
    parser.add_argument("prompt", help=_PROMPT)
    add_sampling(parser, number=1)
    parser.add_argument("-w", "--words", nargs="+", required=True, help="words of the prompt")
    parser.add_argument(
        "-o", "--output", type=user_path, default=Path("maps.png"),
        help="the PNG file (default: maps.png)",
    )  # fmt: skip
    parser.set_defaults(run=_maps)

    parser = commands.add_parser(
        "swap", help="generate with the attention of one prompt and the content of another"
    )
    parser.add_argument("--key-prompt", help="prompt of the keys: where the image attends")
    parser.add_argument("--value-prompt", help="prompt of the values: what is shown there")
    parser.add_argument(
        "--sheet", nargs="+", metavar="PROMPT",
        help="one sheet of every prompt's keys with every prompt's values",
    )  # fmt: skip
    add_sampling(parser, number=1)
    parser.add_argument(
        "-o", "--output", type=user_path,
        help=f"folder for the PNG files (default: {_IMAGES}); with --sheet the PNG file (default: "
        "swap.png)",
    )  # fmt: skip
    parser.set_defaults(run=_swap)


def _generate(options: argparse.Namespace) -> int:
    boxes = [(prompt, _box(box)) for prompt, box in options.region]
    check_images_folder(options, options.output)
    pipe, sampling = attached_pipeline(options, [options.prompt, *(prompt for prompt, _ in boxes)])
    from sefi_fast.pipelines import generate, regions

    with regions(pipe, boxes) if boxes else nullcontext():
        images = generate(pipe, options.prompt, n=options.number, **sampling)
    save_images(images, options.output, options.seed)
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


def _maps(options: argparse.Namespace) -> int:
    check_sheet(options, options.output)
    pipe, sampling = attached_pipeline(options, [options.prompt])
    from sefi_fast.evaluation import Panel, contact_sheet
    from sefi_fast.pipelines import generate, trace

    with trace(pipe, words=options.words) as traced:
        # The trace holds one call of the pipeline, so that call generates all images.
        count = options.number
        images = generate(pipe, options.prompt, n=count, batch_size=count, **sampling)
    rows = []
    for index, image in enumerate(images):
        panels = [Panel(image, options.prompt)]
        panels += [Panel(traced.overlay(image, word, index), word) for word in options.words]
        rows.append(("", panels))
    write_image(options.output, contact_sheet(rows, panel_size=256))
    report(options.output)
    return 0


def _swap(options: argparse.Namespace) -> int:
    pair = [text for text in (options.key_prompt, options.value_prompt) if text is not None]
    if (options.sheet is None) == (not pair) or len(pair) == 1:
        raise ValueError(
            "give --key-prompt and --value-prompt, or --sheet with two prompts or more"
        )
    if options.sheet is not None:
        return _swap_sheet(options)
    folder = options.output or _IMAGES
    check_images_folder(options, folder)
    pipe, sampling = attached_pipeline(options, pair)
    from sefi_fast.pipelines import swap

    images = swap(pipe, key_prompt=pair[0], value_prompt=pair[1], n=options.number, **sampling)
    save_images(images, folder, options.seed)
    return 0


def _swap_sheet(options: argparse.Namespace) -> int:
    if len(options.sheet) < 2:
        raise ValueError("--sheet compares prompts: give two or more")
    if options.number != 1:
        raise ValueError("--sheet has one image for each pair of prompts: leave --number out")
    path = options.output or Path("swap.png")
    check_sheet(options, path)
    pipe, sampling = attached_pipeline(options, options.sheet)
    from sefi_fast.evaluation import swap_sheet

    write_image(path, swap_sheet(pipe, options.sheet, **sampling))
    report(path)
    return 0
