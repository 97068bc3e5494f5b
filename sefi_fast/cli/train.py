"""`sefi-fast train` and `sefi-fast train-many`."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sefi_fast.cli.options import (
    Commands,
    add_config_fields,
    add_model,
    add_preset,
    check_kept,
    check_suffix,
    config_overrides,
    report,
    try_write_image,
)
from sefi_fast.errors import printable
from sefi_fast.utils.files import (
    LONGEST_NAME,
    check_folder,
    check_output,
    expanded,
    fitting_name,
    remove_partials,
    user_path,
)
from sefi_fast.utils.malloc import keep_freed_memory_on_cpu

if TYPE_CHECKING:
    from PIL import Image

    from sefi_fast.training import History, ManyResult, TrainConfig

logger = logging.getLogger(__name__)

_VALIDATION = "images of the validation prompts during training"


def add(commands: Commands) -> None:
    parser = commands.add_parser("train", help="train a subject on one image")
    parser.add_argument(
        "image", type=user_path, nargs="?", help="the image, unless the config file names it"
    )
    add_model(parser)
    parser.add_argument("--class-word", help="what the subject is: person, cat, golden retriever …")
    parser.add_argument("--placeholder", help="its name in prompts (default: <it>)")
    parser.add_argument(
        "--mask", type=user_path,
        help="image that is white on the subject, for --attention-loss mask",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=user_path, help="the subject file (default: subject.safetensors)"
    )
    parser.add_argument(
        "-c", "--config", type=user_path, metavar="FILE",
        help="YAML or JSON file of any of these options; the command line takes precedence",
    )  # fmt: skip
    parser.add_argument(
        "--save-config", type=user_path, metavar="FILE",
        help="file for all options of this run (default: next to the output, as me.run.yaml)",
    )  # fmt: skip
    add_preset(parser)
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=None,
        help="resume from the newest checkpoint; --no-resume removes it and starts again",
    )  # fmt: skip
    parser.add_argument(
        "--resume-from", metavar="WHERE",
        help="a checkpoint, a folder of checkpoints, or auto: resume if there is one, else start",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    add_config_fields(parser)
    parser.set_defaults(run=_train)

    parser = commands.add_parser(
        "train-many", help="train many subjects, from a folder of images or a manifest"
    )
    parser.add_argument(
        "manifest", type=user_path,
        help="a folder of images, or a .csv, .tsv or .jsonl file with the columns image, "
        "class_word, name, placeholder, seed, scene, mask, model, model_config, vae (only image is "
        "needed)",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument(
        "-o", "--output", type=user_path, required=True, help="folder for the subject files"
    )
    parser.add_argument("--class-word", help="class word of subjects without their own")
    parser.add_argument(
        "-n", "--batch-subjects", type=int, help="subjects to train at once (default: 8)"
    )
    add_preset(parser)
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="resume from checkpoints; --no-resume removes them and starts again",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="train subjects again whose files exist"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    add_config_fields(parser)
    parser.set_defaults(run=_train_many)


def _train(options: argparse.Namespace) -> int:
    config, given = _settings(options)
    if given["image"] is None:
        raise ValueError("the image is missing: name its file, here or as image in the config")
    if options.resume is not None and options.resume_from is not None:
        raise ValueError("--resume-from says all that --resume does: give one of them")
    output = Path("subject.safetensors" if given["output"] is None else given["output"])
    given["output"] = str(output)
    check_suffix(output, ".safetensors")
    curves, sheet, run_file = (
        output.with_name(fitting_name(output.stem, LONGEST_NAME - len(end)) + end)
        for end in ("-training.png", "-validation.png", ".run.yaml")
    )
    if options.save_config is not None:
        run_file = check_output(options.save_config)
    read = [given[name] for name in ("image", "mask", "model", "vae")]
    check_kept((output, curves, sheet, run_file), read)
    from sefi_fast.evaluation import training_curves, validation_sheet
    from sefi_fast.training import train

    keep_freed_memory_on_cpu()
    placeholder = "<it>" if given["placeholder"] is None else given["placeholder"]
    subject = train(
        image=given["image"],
        model=given["model"],
        model_config=given["model_config"],
        vae=given["vae"],
        class_word=given["class_word"],
        placeholder=placeholder,
        mask=given["mask"],
        config=config,
        output=output,
        resume=options.resume if options.resume_from is None else options.resume_from,
        progress=not options.quiet,
        callback=_run_file_writer(options, config, given, run_file),
    )
    report(f"{output}: use it as {placeholder} in a prompt")
    history, title = subject.history, printable(Path(given["image"]).name, 60)
    if history and history.loss:
        _save(curves, "the loss", lambda: training_curves(history, title=title))
    if history and history.validation:
        prompts = [x.replace("{}", placeholder) for x in config.validation_prompts]
        _save(sheet, _VALIDATION, lambda: validation_sheet(history, prompts))
    return 0


def _save(path: Path, what: str, make: Callable[[], Image.Image]) -> None:
    if try_write_image(path, what, make):
        report(f"{path}: {what}")


def _settings(options: argparse.Namespace) -> tuple[TrainConfig, dict[str, str | None]]:
    """Return the run's settings and inputs; the command line takes precedence over the file."""
    from sefi_fast.training import TrainConfig
    from sefi_fast.training.config import RUN_KEYS, RunFile, read_settings

    file = RunFile({}, {}) if options.config is None else read_settings(options.config)
    given: dict[str, str | None] = {}
    for name in RUN_KEYS:
        if name == "preset":
            continue
        value = getattr(options, name)
        value = file.run.get(name) if value is None else str(value)
        if value is not None and name not in ("class_word", "placeholder"):
            value = expanded(value)
        given[name] = value
    overrides = {**file.fields, **config_overrides(options)}
    if options.preset is None:
        return TrainConfig.from_overrides(None, overrides), given
    if options.config is not None:
        raise ValueError(
            "--preset and --config were both given: write the preset into the config file, as "
            f"'preset: {options.preset}'"
        )
    return TrainConfig.preset(options.preset, **overrides), given


def _run_file_writer(
    options: argparse.Namespace, config: TrainConfig, given: dict[str, str | None], path: Path
) -> Callable[[int, History], None]:
    """Return a callback that writes the run's options to a file after the first step."""
    from sefi_fast.training.config import write_settings

    is_written = options.config is not None and os.path.realpath(options.config) == (
        os.path.realpath(path)
    )

    def write_once(step: int, history: History) -> None:
        nonlocal is_written
        if is_written:
            return
        is_written = True
        named = {name: value for name, value in given.items() if value is not None}
        try:
            remove_partials(path)
            write_settings(path, {**named, **config.as_dict()})
        except OSError as error:
            logger.warning("the run's options could not be written to %s: %s", path, error)

    return write_once


def _train_many(options: argparse.Namespace) -> int:
    from sefi_fast.training import train_many

    keep_freed_memory_on_cpu()
    overrides = config_overrides(options)
    prompts = overrides.get("validation_prompts", ())
    # Not next to the subjects' files: a folder that is its own manifest would train on the sheets.
    sheets = options.output / "validation"
    if prompts:
        _check_sheets(options, sheets)
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
        on_result=lambda result: _save_validation(sheets, result, prompts),
        **overrides,
    )
    failed = [result.name for result in results if result.error is not None]
    before = sum(result.before for result in results)
    words = f"{len(results) - len(failed) - before} subjects trained"
    words += f", {before} existed already" if before else ""
    words += f", {len(failed)} failed: {', '.join(failed)}" if failed else ""
    report(f"{options.output}: {words}")
    if sheets.is_dir() and prompts:
        report(f"{sheets}: {_VALIDATION}")
    return 1 if failed else 0


def _save_validation(folder: Path, result: ManyResult, prompts: Sequence[str]) -> None:
    history = None if result.subject is None else result.subject.history
    if result.subject is None or history is None or not history.validation:
        return
    from sefi_fast.evaluation import validation_sheet

    captions = [text.replace("{}", result.subject.placeholder) for text in prompts]
    what = f"the sheet of validation prompts of {result.name}"
    path = _sheet(folder, result.name)
    try_write_image(path, what, lambda: validation_sheet(history, captions))


def _check_sheets(options: argparse.Namespace, folder: Path) -> None:
    """Raise ValueError or OSError if sheets cannot be saved, or would overwrite an input image."""
    from sefi_fast.training.manifest import read_subjects

    check_folder(folder, make=False)
    entries = read_subjects(options.manifest, options.model, options.model_config, options.vae)
    files = [Path(x) for e in entries for x in (e.image, e.mask) if isinstance(x, (str, Path))]
    inside = [file for file in files if os.path.realpath(file.parent) == os.path.realpath(folder)]
    check_kept((_sheet(folder, entry.name) for entry in entries), inside)


def _sheet(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"
