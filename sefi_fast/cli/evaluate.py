"""`sefi-fast evaluate`: score finished subjects on any model, or compare settings in studies."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from sefi_fast.cli.options import add_config_fields, add_model, config_overrides
from sefi_fast.cli.outputs import report
from sefi_fast.host_memory import keep_freed_memory_on_cpu
from sefi_fast.utils.files import user_path

IDENTITIES = 12
_OF_SUBJECTS = ("model", "model_config", "vae", "images", "guidance", "clip", "dino", "face")
_OF_STUDIES = ("variants", "identities", "workers", "side_by_side")
_NOT_OF_TWO = ("prompts", "sampling_steps", "variants", "workers", "side_by_side")


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "evaluate", help="score finished subjects, or compare settings on the tiny world"
    )
    parser.add_argument("subjects", type=user_path, nargs="*", help="subject files to score")
    parser.add_argument(
        "--prompts", metavar="FILE|NUMBER",
        help="a file of prompts, {} where the subject stands; of a study: how many an identity "
        "(default: 12)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=4, help="pictures a prompt (default: 4)")
    parser.add_argument("--sampling-steps", type=int, help="denoising steps of a picture")
    parser.add_argument(
        "-o", "--output", type=user_path, help="folder (default: evaluation, evidence)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    scores = parser.add_argument_group("scoring finished subjects")
    add_model(scores)
    scores.add_argument(
        "--images", type=user_path, nargs="+", metavar="IMAGE",
        help="the picture that each subject was learnt from, for the image scores",
    )  # fmt: skip
    scores.add_argument("--guidance", type=float, help="guidance scale")
    scores.add_argument("--clip", metavar="MODEL", help="CLIP, a folder or hub id")
    scores.add_argument("--dino", metavar="MODEL", help="DINO or DINOv2, a folder or hub id")
    scores.add_argument("--face", metavar="MODEL", help="an insightface model pack")
    study = parser.add_argument_group("studies on the tiny world")
    study.add_argument(
        "--study", nargs="+", metavar="NAME",
        help="lambda, loss, pairs, vectors, peers, module, rate, steps, choices, better or all; or "
        "two: two subjects in one picture",
    )  # fmt: skip
    study.add_argument(
        "--variants", nargs="+", metavar="NAME", help="only these of the studies' variants"
    )
    study.add_argument("--identities", type=int, help=f"(default: {IDENTITIES})")
    study.add_argument("--workers", type=int, help="processes (default: 1)")
    study.add_argument(
        "--side-by-side", type=int, metavar="N",
        help="identities trained in one batch (default: 4)",
    )  # fmt: skip
    add_config_fields(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    if bool(options.subjects) == bool(options.study):
        raise ValueError(
            "say what to evaluate: subject files, or --study lambda (or another; not both)"
        )
    return _study(options) if options.study else _subjects(options)


def _refuse(options: argparse.Namespace, names: Iterable[str], what: str) -> None:
    """Raise ValueError where an option is given that this evaluation would not heed."""
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"{what} has no --{name.replace('_', '-')}: leave it out")


def _identities(options: argparse.Namespace) -> int:
    return IDENTITIES if options.identities is None else options.identities


def _study(options: argparse.Namespace) -> int:
    _refuse(options, _OF_SUBJECTS, f"--study {' '.join(options.study)}")
    if "two" in options.study:
        return _two(options)
    prompts = options.prompts or "12"
    if not prompts.isdigit():
        raise ValueError(f"a study's --prompts is how many an identity, a number; got {prompts!r}")
    from sefi_fast.evaluation import run_study

    keep_freed_memory_on_cpu()
    pace = {"workers": options.workers, "side_by_side": options.side_by_side}
    found = run_study(
        options.study,
        output=options.output or "evidence",
        identities=_identities(options),
        prompts=int(prompts),
        seeds=options.seeds,
        **{name: value for name, value in pace.items() if value is not None},
        sampling_steps=options.sampling_steps,
        variants=options.variants,
        progress=not options.quiet,
        **config_overrides(options),
    )
    for path in found.files:
        report(path)
    return 1 if found.failures else 0


def _two(options: argparse.Namespace) -> int:
    if options.study != ["two"]:
        raise ValueError("--study two draws pairs of subjects, and stands alone: run it by itself")
    _refuse(options, _NOT_OF_TWO, "--study two")
    from sefi_fast.evaluation import compare_two_subjects

    keep_freed_memory_on_cpu()
    files = compare_two_subjects(
        output=options.output or "evidence",
        identities=_identities(options),
        seeds=options.seeds,
        progress=not options.quiet,
        **config_overrides(options),
    )
    for path in files:
        report(path)
    return 0


def _subjects(options: argparse.Namespace) -> int:
    _refuse(options, _OF_STUDIES, "scoring of finished subjects")
    unused = sorted(config_overrides(options))
    if unused:
        raise ValueError(
            f"finished subjects are not trained, so {', '.join(unused)} means nothing here; "
            "the sampler's steps are --sampling-steps"
        )
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
        output=options.output or "evaluation",
        progress=not options.quiet,
    )
    for path in found.files:
        report(path)
    return 0
