"""`sefi-fast train-many`: learn many subjects side by side."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sefi_fast.cli.options import add_config_fields, add_model, add_preset, config_overrides
from sefi_fast.cli.outputs import check_kept, leave_picture, report
from sefi_fast.host_memory import keep_freed_memory_on_cpu
from sefi_fast.training.output import check_folder
from sefi_fast.utils.files import user_path

if TYPE_CHECKING:
    from sefi_fast.training import ManyResult


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "train-many", help="learn many subjects, from a folder of pictures or a manifest"
    )
    parser.add_argument(
        "manifest", type=user_path,
        help="a folder of pictures, or a .csv, .tsv or .jsonl file with the columns image, "
        "class_word, name, placeholder, seed, scene, mask, model, model_config, vae (only image is "
        "needed)",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument(
        "-o", "--output", type=user_path, required=True, help="folder for the subject files"
    )
    parser.add_argument("--class-word", help="of the subjects that have none of their own")
    parser.add_argument(
        "-n", "--batch-subjects", type=int, help="how many train side by side (default: 8)"
    )
    add_preset(parser)
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="go on from checkpoints; --no-resume removes them and begins anew",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="learn those anew too whose file is there"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_config_fields(parser)
    parser.set_defaults(run=_train_many)


def _train_many(options: argparse.Namespace) -> int:
    from sefi_fast.training import train_many

    keep_freed_memory_on_cpu()
    overrides = config_overrides(options)
    prompts = overrides.get("validation_prompts", ())
    pictures = options.output / "validation"
    if prompts:
        _check_pictures(options, pictures)
    if options.batch_subjects is not None:
        overrides["batch_subjects"] = options.batch_subjects
    results = train_many(
        options.manifest,
        model=options.model,
        model_config=options.model_config,
        vae=options.vae,
        output=options.output,
        class_word=options.class_word,
        preset=options.preset,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=not options.quiet,
        on_result=lambda result: _leave_validation(pictures, result, prompts),
        **overrides,
    )
    failed = [result for result in results if result.error is not None]
    before = sum(result.before for result in results)
    learnt = len(results) - len(failed) - before
    words = f"{learnt} subjects learnt"
    words += f", {before} were there already" if before else ""
    words += f", {len(failed)} failed: {', '.join(r.name for r in failed)}" if failed else ""
    report(f"{options.output}: {words}")
    if pictures.is_dir() and prompts:
        report(f"{pictures}: the validation prompts as training went on")
    return 1 if failed else 0


def _leave_validation(folder: Path, result: ManyResult, prompts: Sequence[str]) -> None:
    """A sheet of the pictures that were drawn while a subject trained, in a folder of their own.

    Not beside the subject's file, where a folder that is its own manifest would have it learnt.
    """
    history = None if result.subject is None else result.subject.history
    if result.subject is None or history is None or not history.validation:
        return
    from sefi_fast.evaluation import validation_sheet

    captions = [text.replace("{}", result.subject.placeholder) for text in prompts]
    what = f"the validation prompts of {result.name}"
    leave_picture(_sheet(folder, result.name), what, lambda: validation_sheet(history, captions))


def _check_pictures(options: argparse.Namespace, folder: Path) -> None:
    """Raise ValueError or OSError if the sheets cannot be left, or lie where a picture is read."""
    from sefi_fast.training.manifest import read_subjects

    check_folder(folder, make=False)
    entries = read_subjects(options.manifest, options.model, options.model_config, options.vae)
    files = [Path(x) for e in entries for x in (e.image, e.mask) if isinstance(x, (str, Path))]
    inside = [file for file in files if os.path.realpath(file.parent) == os.path.realpath(folder)]
    check_kept((_sheet(folder, entry.name) for entry in entries), inside)


def _sheet(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"
