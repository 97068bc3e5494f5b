"""`sefi-fast export` and `sefi-fast import`: Textual Inversion files of other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from sefi_fast.cli.options import Commands, add_model, check_file, report
from sefi_fast.utils.files import user_path


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "export", help="write a subject as an embedding for diffusers, A1111 or ComfyUI"
    )
    parser.add_argument("subject", type=user_path, help="a subject file")
    parser.add_argument(
        "-o", "--output", type=user_path, required=True, metavar="FILE",
        help="the .safetensors file; A1111 and ComfyUI take its name as the word for prompts",
    )  # fmt: skip
    parser.add_argument(
        "--mean-of-stages", action="store_true",
        help="write the mean over stages, keys and values, which is a weaker subject",
    )  # fmt: skip
    parser.set_defaults(run=_export)

    parser = commands.add_parser(
        "import", help="convert an embedding of diffusers, A1111 or ComfyUI to a subject"
    )
    parser.add_argument(
        "embedding", type=user_path, nargs="+",
        help="a .safetensors file, or one for each text encoder",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument("--class-word", required=True, help="what it shows: person, cat …")
    parser.add_argument("--placeholder", help="its name in prompts (default: its name in the file)")
    parser.add_argument(
        "-o", "--output", type=user_path, default=Path("subject.safetensors"), metavar="FILE",
        help="the subject file (default: subject.safetensors)",
    )  # fmt: skip
    parser.set_defaults(run=_import)


def _export(options: argparse.Namespace) -> int:
    check_file(options.output, [options.subject], ".safetensors")
    from sefi_fast.subject import Subject, export_embedding

    subject = Subject.load(options.subject)
    exact = subject.stages == 1 and not subject.split
    if not exact and not options.mean_of_stages:
        raise ValueError(
            f"{options.subject} holds {subject!r}, and an embedding file holds one row a vector: "
            "pass --mean-of-stages to write their mean, a weaker subject, or train with --preset "
            "textual-inversion"
        )
    path = export_embedding(subject, options.output, lossy=not exact)
    loss = "" if exact else ", the mean of its stages: its images are less like the subject"
    report(f"{path}: {subject.placeholder} for pipe.load_textual_inversion{loss}")
    return 0


def _import(options: argparse.Namespace) -> int:
    check_file(options.output, [*options.embedding, options.model, options.vae], ".safetensors")
    from sefi_fast.pipelines import load_pipeline
    from sefi_fast.subject import import_embedding
    from sefi_fast.training.base_model import model_settings

    # On the CPU in float32: only the rows of the class word are read.
    pipe = load_pipeline(options.model, device="cpu", config=options.model_config, vae=options.vae)
    subject = import_embedding(
        options.embedding, pipe, class_word=options.class_word, placeholder=options.placeholder
    )
    if options.model is not None:
        subject.settings |= model_settings(options.model, options.model_config, options.vae)
    subject.save(options.output)
    report(f"{options.output}: use it as {subject.placeholder} in a prompt")
    return 0
