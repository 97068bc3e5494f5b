"""`sefi-fast evaluate`: score trained subjects on any model."""

from __future__ import annotations

import argparse

from sefi_fast.cli.options import Commands, add_model, report
from sefi_fast.utils.files import user_path
from sefi_fast.utils.malloc import keep_freed_memory_on_cpu


def add(commands: Commands) -> None:
    parser = commands.add_parser("evaluate", help="score trained subjects")
    parser.add_argument("subjects", type=user_path, nargs="+", help="subject files to score")
    add_model(parser)
    parser.add_argument(
        "--prompts", metavar="FILE", help="a file of prompts, with {} in place of the subject"
    )
    parser.add_argument(
        "--images", type=user_path, nargs="+", metavar="IMAGE",
        help="the image that each subject was trained on, for the image scores",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=4, help="images for each prompt (default: 4)")
    parser.add_argument("--sampling-steps", type=int, help="denoising steps of an image")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--clip", metavar="MODEL", help="CLIP, a folder or hub id")
    parser.add_argument("--dino", metavar="MODEL", help="DINO or DINOv2, a folder or hub id")
    parser.add_argument("--face", metavar="MODEL", help="an insightface model pack")
    parser.add_argument(
        "-o", "--output", type=user_path, default="evaluation", help="folder (default: evaluation)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from sefi_fast.evaluation import evaluate

    keep_freed_memory_on_cpu()
    found = evaluate(
        options.subjects,
        model=options.model,
        model_config=options.model_config,
        vae=options.vae,
        prompts=options.prompts,
        references=options.images,
        seeds=options.seeds,
        steps=options.sampling_steps,
        guidance=options.guidance,
        clip=options.clip,
        dino=options.dino,
        face=options.face,
        output=options.output,
        progress=not options.quiet,
    )
    for path in found.files:
        report(path)
    return 0
