"""Options, checks and output that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import logging
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sefi_fast.errors import ModelError, PromptError, printable
from sefi_fast.utils.files import (
    atomic_write,
    check_folder,
    check_output,
    expanded,
    is_one_of,
    remove_partials,
    user_path,
)
from sefi_fast.utils.malloc import keep_freed_memory_on_cpu
from sefi_fast.utils.text import mentions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from sefi_fast.subject import Subject

logger = logging.getLogger(__name__)

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Size: TypeAlias = tuple[int | None, int | None]

STRENGTH = 0.8
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def report(text: object) -> None:
    """Print a line on standard output, escaped if a file or an argument made it unsafe."""
    print(printable(str(text)))


def check_suffix(path: Path, *known: str) -> None:
    """Raise ValueError unless the name of an output ends in a known suffix."""
    if path.suffix.lower() not in known:
        raise ValueError(f"output {str(path)!r} must end in {' or '.join(known)}")


def check_kept(outputs: Iterable[Path], inputs: Sequence[str | Path | None]) -> None:
    """Raise ValueError if one of the outputs is a file that the command reads."""
    for path in outputs:
        if is_one_of(path, inputs):
            raise ValueError(
                f"{path} would be overwritten, and this command reads it: give the output another "
                "name"
            )


def check_file(path: Path, inputs: Sequence[str | Path | None], *known: str) -> None:
    """Raise ValueError or OSError if an output has another suffix or cannot be written."""
    check_suffix(path, *known)
    check_output(path)
    check_kept([path], inputs)


def check_sheet(options: argparse.Namespace, path: Path) -> None:
    """Raise ValueError or OSError if a command with `add_sampling` cannot write its image."""
    check_file(path, [options.image, options.mask, *options.control_image], *_FORMATS)


def check_images_folder(options: argparse.Namespace, folder: Path) -> None:
    """Raise ValueError or OSError if a command with `add_sampling` cannot write its images."""
    check_folder(folder, make=False)
    paths = [_numbered(folder, options.seed + number) for number in range(options.number)]
    check_kept(paths, [options.image, options.mask, *options.control_image])
    for path in paths:
        check_output(path)


def save_images(images: Sequence[Image.Image], folder: Path, seed: int) -> None:
    """Write each image under the number of its seed, and print its path."""
    for number, image in enumerate(images, seed):
        path = _numbered(folder, number)
        write_image(path, image)
        report(path)


def _numbered(folder: Path, seed: int) -> Path:
    return folder / f"{seed:05d}.png"


def write_image(path: Path, image: Image.Image) -> None:
    """Write an image in the format of its name, whole or not at all. Create missing folders."""
    remove_partials(path)
    stream = io.BytesIO()
    image.save(stream, format=_FORMATS[path.suffix.lower()])
    atomic_write(path, stream.getvalue())


def try_write_image(path: Path, what: str, make: Callable[[], Image.Image]) -> bool:
    """Make and write an image of a finished run; warn instead of failing."""
    try:
        write_image(path, make())
    except Exception as error:
        logger.warning("%s could not be saved to %s: %s", what, path, error)
        return False
    return True


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", type=expanded,
        help="diffusers folder, hub id or .safetensors file (default: the bundled tiny model)",
    )  # fmt: skip
    parser.add_argument(
        "--model-config", metavar="FOLDER",
        help="for a model in one file: the diffusers folder of a model of the same architecture, "
        "for configurations and tokenizers, so that the hub is not needed",
    )  # fmt: skip
    parser.add_argument(
        "--vae", help="a VAE in place of the model's: a folder, a hub id or a .safetensors file"
    )


def add_preset(parser: argparse.ArgumentParser) -> None:
    from sefi_fast.training.config import PRESETS

    parser.add_argument("--preset", help=f"settings by name: {', '.join(PRESETS)}")


def add_config_fields(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of TrainConfig."""
    from sefi_fast.training import TrainConfig

    group = parser.add_argument_group("training settings")
    hints = typing.get_type_hints(TrainConfig)
    defaults = TrainConfig()
    for field in dataclasses.fields(TrainConfig):
        kind, repeated, optional = _option_type(hints[field.name])
        default = getattr(defaults, field.name)
        shown = "" if default is None else f"(default: {default})"
        text = f"{field.metadata.get('help', '')} {shown}".strip().replace("%", "%%")
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = _or_none(kind) if optional and kind is not str else kind
            keywords["metavar"] = field.name.split("_")[-1].upper()
            keywords["nargs"] = "+" if repeated else None
        name = "--" + field.name.replace("_", "-")
        group.add_argument(name, dest=f"config_{field.name}", **keywords)


def config_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of TrainConfig that the command line names."""
    return {
        name.removeprefix("config_"): tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name.startswith("config_")
    }


def _option_type(hint: Any) -> tuple[type, bool, bool]:
    """Return the type of a field's value, whether it is repeated, and whether it may be None."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        optional = True
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return str, False, optional
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, False
    return hint, False, optional


def _or_none(kind: type) -> Callable[[str], Any]:
    """Return a function that parses a value of this type, or the word none."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    # argparse prints the name in its error.
    read.__name__ = kind.__name__
    return read


def add_sampling(parser: argparse.ArgumentParser, number: int) -> None:
    """Add options of subjects, model, sampling and images; `number` is the default of --number."""
    parser.add_argument(
        "-s", "--subject", action="append", default=[], metavar="FILE",
        help="a subject file, or '<me>=FILE' to call it <me> here; may be repeated",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument("--negative-prompt", help="a prompt of what to avoid")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument(
        "-n", "--number", type=int, default=number, help=f"number of images (default: {number})"
    )
    for side in ("width", "height"):
        parser.add_argument(
            f"--{side}", type=int, help=f"{side} in pixels (default: the model's, or --image's)"
        )
    parser.add_argument(
        "--controlnet", action="append", default=[], metavar="MODEL",
        help="folder, hub id or .safetensors file of a ControlNet; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--control-image", type=user_path, action="append", default=[], metavar="FILE",
        help="the hint (pose, edges, depth) for each --controlnet, in the same order",
    )  # fmt: skip
    parser.add_argument("--image", type=user_path, metavar="FILE", help="an image to change")
    parser.add_argument(
        "--strength", type=float,
        help=f"how much of --image to change, 0 to 1 (default: {STRENGTH})",
    )  # fmt: skip
    parser.add_argument(
        "--mask", type=user_path, metavar="FILE",
        help="white where --image is to change, black or transparent elsewhere",
    )  # fmt: skip


def attached_pipeline(
    options: argparse.Namespace, prompts: Sequence[str]
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Return the pipeline with the subjects attached, and the sampling settings of its call.

    Each subject must be in one of the prompts.
    """
    # Before slow imports.
    _check_sampling(options)
    from sefi_fast.pipelines import attach, load_pipeline
    from sefi_fast.pipelines.loading import kept_model
    from sefi_fast.tiny_world import SAMPLING

    keep_freed_memory_on_cpu()
    loaded = _subjects(options.subject)
    subjects = [subject for _, subject in loaded]
    for subject in subjects:
        if not any(mentions(text, subject.placeholder) for text in prompts):
            raise PromptError(
                f"{' and '.join(map(repr, prompts))} does not name the subject "
                f"{subject.placeholder}. Write it in place of the {subject.class_word}, or leave "
                "its file out"
            )
    given = {"model": options.model, "config": options.model_config, "vae": options.vae}
    named_by = None
    if options.model is None and subjects:
        named_by = loaded[0][0]
        kept = kept_model(subjects[0])
        given = {name: kept[name] if value is None else value for name, value in given.items()}
    try:
        pipe = load_pipeline(**given)
    except ModelError as error:
        if named_by is None:
            raise
        raise ModelError(f"{error} (the model that {named_by} names; give --model)") from error
    _check_placeholders(pipe, [*prompts, options.negative_prompt or ""], subjects)
    pipe, images = _with_images(options, pipe)
    if subjects:
        attach(pipe, subjects)
    names = ("steps", "guidance", "negative_prompt", "seed")
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    sampling = (SAMPLING if given["model"] is None else {}) | chosen | images
    steps, strength = sampling.get("steps", 30), sampling.get("strength", 1.0)
    if int(steps * strength) < 1:
        raise ValueError(
            f"{steps} steps at strength {strength} are less than one: give more --steps or more "
            "--strength"
        )
    return pipe, sampling


def _check_sampling(options: argparse.Namespace) -> None:
    """Raise ValueError if options of `add_sampling` are out of range or do not go together."""
    for name in ("number", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}: give 1 or more")
    nets, hints = len(options.controlnet), len(options.control_image)
    if nets != hints:
        raise ValueError(
            f"--controlnet was given {nets} times and --control-image {hints} times: give one "
            "image for each ControlNet"
        )
    for name in ("mask", "strength"):
        if options.image is None and getattr(options, name) is not None:
            raise ValueError(f"--{name} is for changing an image: give --image too")
    for name in ("width", "height"):
        value = getattr(options, name)
        if value is not None and (value < 8 or value % 8):
            raise ValueError(f"--{name} is {value} pixels: give a multiple of 8, and at least 8")
    if options.strength is not None and not 0 < options.strength <= 1:
        raise ValueError(f"--strength is {options.strength}: give more than 0 and at most 1")


def _subjects(given: Sequence[str]) -> list[tuple[Path, Subject]]:
    """Load subjects from FILE or NAME=FILE; a file whose name has the sign is taken as it is."""
    from sefi_fast.subject import Subject

    found: dict[str, tuple[Path, Subject]] = {}
    for text in given:
        named = re.fullmatch(r"(<[^<>]*>|[^=]*)=(.*)", text, re.DOTALL)
        if named is None or os.path.exists(os.path.expanduser(text)):
            path = user_path(text)
            subject = Subject.load(path)
        else:
            path = user_path(named[2])
            subject = dataclasses.replace(Subject.load(path), placeholder=named[1])
        if subject.placeholder in found:
            first = found[subject.placeholder][0]
            raise ValueError(
                f"{first} and {path} both have the placeholder {subject.placeholder!r}: give one "
                f"another for this call, as -s '<other>={path}', or train it with --placeholder"
            )
        found[subject.placeholder] = path, subject
    return list(found.values())


def _check_placeholders(
    pipe: DiffusionPipeline, prompts: Sequence[str], subjects: Sequence[Subject]
) -> None:
    """Raise PromptError for a placeholder whose subject was not given."""
    from sefi_fast.prompts.text_encoder import present_text_encoders
    from sefi_fast.prompts.tokenization import unknown_placeholders

    names = [subject.placeholder for subject in subjects]
    tokenizers = [encoder.tokenizer for encoder in present_text_encoders(pipe)]
    if unknown := unknown_placeholders(prompts, names, tokenizers):
        given = ", ".join(map(repr, names)) or "none"
        raise PromptError(
            f"the prompt names {' and '.join(unknown)}, but no subject of that name was given "
            f"(given: {given}): add the file of each with -s FILE, or -s "
            f"'{unknown[0]}=FILE' if it was trained under another name"
        )


def _with_images(
    options: argparse.Namespace, pipe: DiffusionPipeline
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Return the pipeline that takes the images of the options, and arguments of its call."""
    from sefi_fast.prompts.text_encoder import unwrap

    size: Size = (options.width, options.height)
    arguments: dict[str, Any] = {}
    if options.controlnet or options.image is not None:
        # It imports all of diffusers' pipelines.
        from sefi_fast.pipelines.controlnet import load_controlnet, steered

        pipe = steered(
            pipe,
            controlnets=[load_controlnet(source, pipe) for source in options.controlnet],
            image=options.image is not None,
            mask=options.mask is not None,
        )
    elif size.count(None) == 1:
        # diffusers' pipelines take the model's own for both if one is missing.
        own, scale = unwrap(pipe.unet).config.sample_size, pipe.vae_scale_factor
        height, width = (own, own) if isinstance(own, int) else own
        size = size[0] or width * scale, size[1] or height * scale
    if options.image is not None:
        image = _load(options.image, size, pipe.vae_scale_factor)
        size = image.size
        arguments["image"] = image
        arguments["strength"] = STRENGTH if options.strength is None else options.strength
        if options.mask is not None:
            from sefi_fast.training.latents import check_selection, open_mask

            mask = open_mask(options.mask).resize(size).convert("L")
            levels = [level for level, count in enumerate(mask.histogram()) if count]
            check_selection(levels[0] / 255, levels[-1] / 255, "the image to change")
            arguments["mask_image"] = mask
    if options.controlnet:
        hints = [_load(path, size, pipe.vae_scale_factor) for path in options.control_image]
        name = "control_image" if options.image is not None else "image"
        arguments[name] = hints[0] if len(hints) == 1 else hints
    takes = inspect.signature(type(pipe).__call__).parameters
    for name, value in zip(("width", "height"), size, strict=True):
        if value is not None and name in takes:
            arguments[name] = value
    return pipe, arguments


def _load(path: Path, size: Size, multiple: int) -> Image.Image:
    """Load an image and resize it; a missing side is the image's own, rounded to whole latents."""
    from sefi_fast.training import load_image

    image = load_image(path)
    width, height = (
        wanted or max(multiple, own // multiple * multiple)
        for wanted, own in zip(size, image.size, strict=True)
    )
    return image if image.size == (width, height) else image.resize((width, height))
