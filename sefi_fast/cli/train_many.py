"""`sefi-fast train-many`: learn many subjects side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sefi_fast.cli.options import add_config_fields, add_model, add_preset, config_overrides
from sefi_fast.host_memory import keep_freed_memory_on_cpu


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "train-many", help="learn many subjects, from a folder of pictures or a manifest"
    )
    parser.add_argument(
        "manifest", type=Path,
        help="a folder of pictures, or a .csv, .tsv or .jsonl file with the columns image, "
        "class_word, name, placeholder, seed, scene, mask, model (image alone is needed)",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder for the subject files"
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
    if options.batch_subjects is not None:
        overrides["batch_subjects"] = options.batch_subjects
    results = train_many(
        options.manifest,
        model=options.model,
        output=options.output,
        class_word=options.class_word,
        preset=options.preset,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=not options.quiet,
        **overrides,
    )
    failed = [result for result in results if result.error is not None]
    before = sum(result.before for result in results)
    learnt = len(results) - len(failed) - before
    words = f"{learnt} subjects learnt"
    words += f", {before} were there already" if before else ""
    words += f", {len(failed)} failed: {', '.join(r.name for r in failed)}" if failed else ""
    print(f"{options.output}: {words}")
    return 1 if failed else 0
