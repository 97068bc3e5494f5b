"""Options that several commands share."""

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
from typing import TYPE_CHECKING, Any

from sefi_fast.utils.files import atomic_write, expanded, remove_partials, user_path
from sefi_fast.utils.malloc import keep_freed_memory_on_cpu
from sefi_fast.utils.outputs import check_folder, check_output, is_one_of
from sefi_fast.utils.text import printable
from sefi_fast.utils.words import mentions

if TYPE_CHECKING:
    from PIL import Image

    from sefi_fast.subject import Subject


logger = logging.getLogger(__name__)

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def report(text: object) -> None:
    """Print a line on standard output, whatever a file or an argument put into it."""
    print(printable(str(text)))


def check_kept(outputs: Iterable[Path], inputs: Sequence[str | Path | None]) -> None:
    """Raise ValueError if one of the outputs is a file that the command reads."""
    for path in outputs:
        if is_one_of(path, inputs):
            raise ValueError(
                f"{path} would be overwritten, and this command reads it: give the output another "
                "name"
            )


def check_safetensors(path: Path) -> None:
    """Raise ValueError or OSError if no safetensors file can be written there."""
    _check_suffix(path, (".safetensors",))
    check_output(path)


def check_sheet(options: argparse.Namespace, path: Path) -> None:
    """Raise ValueError or OSError if a command that draws cannot leave its image there."""
    _check_suffix(path, tuple(_FORMATS))
    check_output(path)
    check_kept([path], _read_by(options))


def check_images_folder(options: argparse.Namespace, folder: Path) -> None:
    """Raise ValueError or OSError if a command that draws cannot leave its images there."""
    check_folder(folder, make=False)
    paths = [_numbered(folder, options.seed + number) for number in range(options.number)]
    check_kept(paths, _read_by(options))
    for path in paths:
        check_output(path)


def save_images(pictures: Sequence[Image.Image], folder: Path, seed: int) -> None:
    """Write each image under the number of its seed, and print where."""
    for number, picture in enumerate(pictures, seed):
        path = _numbered(folder, number)
        write_image(path, picture)
        report(path)


def write_image(path: Path, picture: Image.Image) -> None:
    """Write an image in the format of its name, whole or not at all, missing folders too."""
    remove_partials(path)
    stream = io.BytesIO()
    picture.save(stream, format=_FORMATS[path.suffix.lower()])
    atomic_write(path, stream.getvalue())


def leave_image(path: Path, what: str, draw: Callable[[], Image.Image]) -> bool:
    """Leave an image of a run, or warn: the subject is there, whatever becomes of an image."""
    try:
        write_image(path, draw())
    except Exception as error:
        logger.warning("%s could not be drawn to %s: %s", what, path, error)
        return False
    return True


def _numbered(folder: Path, seed: int) -> Path:
    return folder / f"{seed:05d}.png"


def _read_by(options: argparse.Namespace) -> list[Path | None]:
    """The images that steer a command that draws (`pictures.add_images`)."""
    return [options.image, options.mask, *options.control_image]


def _check_suffix(path: Path, known: tuple[str, ...]) -> None:
    if path.suffix.lower() not in known:
        raise ValueError(f"output {str(path)!r} must end in {' or '.join(known)}")


STRENGTH = 0.8


def add_images(parser: argparse.ArgumentParser) -> None:
    """--width, --height, --controlnet, --control-image, --image, --strength and --mask."""
    parser.add_argument("--width", type=int, help="in pixels (default: the model's, or --image's)")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's, or --image's)")
    parser.add_argument(
        "--controlnet", action="append", default=[], metavar="MODEL",
        help="folder, hub id or .safetensors file of a ControlNet; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--control-image", type=user_path, action="append", default=[], metavar="FILE",
        help="the hint (pose, edges, depth) for each --controlnet, in the same order",
    )  # fmt: skip
    parser.add_argument("--image", type=user_path, metavar="FILE", help="an image to change")
    parser.add_argument(
        "--strength",
        type=float,
        help=f"how much of --image to change, 0 to 1 (default: {STRENGTH})",
    )
    parser.add_argument(
        "--mask",
        type=user_path,
        metavar="FILE",
        help="white where --image is to change, black or transparent elsewhere",
    )


def check_pictures(options: argparse.Namespace) -> None:
    """Raise ValueError where the options do not go together, before anything is loaded."""
    nets, hints = len(options.controlnet), len(options.control_image)
    if nets != hints:
        raise ValueError(
            f"--controlnet was given {nets} times and --control-image {hints} times: give one "
            "image for each ControlNet"
        )
    if options.image is None:
        for name in ("mask", "strength"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} is for changing an image: give --image too")
    for name in ("width", "height"):
        value = getattr(options, name)
        if value is not None and (value < 8 or value % 8):
            raise ValueError(f"--{name} is {value} pixels: give a multiple of 8, and at least 8")
    if options.strength is not None and not 0 < options.strength <= 1:
        raise ValueError(f"--strength is {options.strength}: give more than 0 and at most 1")


def with_pictures(options: argparse.Namespace, pipe: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline that takes the images named, and the arguments to call it with."""
    nets: list[Any] = []
    masked = options.mask is not None
    if options.controlnet or options.image is not None:
        # It imports all of diffusers' pipelines.
        from sefi_fast.pipelines.controlnet import load_controlnet, steered

        nets = [load_controlnet(source, pipe) for source in options.controlnet]
        pipe = steered(pipe, controlnets=nets, image=options.image is not None, mask=masked)
    takes = inspect.signature(type(pipe).__call__).parameters
    size = (options.width, options.height)
    if options.image is None and not nets:
        size = _whole_size(size, pipe)
    arguments: dict[str, Any] = {}
    if options.image is not None:
        picture = _load(options.image, size, pipe.vae_scale_factor)
        size = picture.size
        arguments["image"] = picture
        if masked:
            from sefi_fast.training.latents import check_selection, open_mask

            mask = open_mask(options.mask).resize(size).convert("L")
            lowest, highest = mask.getextrema()
            check_selection(lowest / 255, highest / 255, "the image to change")
            arguments["mask_image"] = mask
        arguments["strength"] = STRENGTH if options.strength is None else options.strength
    if nets:
        hints = [_load(path, size, pipe.vae_scale_factor) for path in options.control_image]
        name = "control_image" if options.image is not None else "image"
        arguments[name] = hints[0] if len(hints) == 1 else hints
    for name, value in zip(("width", "height"), size, strict=True):
        if value is not None and name in takes:
            arguments[name] = value
    return pipe, arguments


def check_steps(sampling: dict[str, Any]) -> None:
    """Raise ValueError where so weak a change of an image leaves no step to do."""
    steps, strength = sampling.get("steps", 30), sampling.get("strength", 1.0)
    if int(steps * strength) < 1:
        raise ValueError(
            f"{steps} steps at strength {strength} are less than one: give more --steps or more "
            "--strength"
        )


def _whole_size(size: tuple[int | None, int | None], pipe: Any) -> tuple[int | None, int | None]:
    """Width and height, of which the model gives what is missing; none where both are.

    diffusers' pipelines of Stable Diffusion take the model's own for both where one is missing.
    """
    if size.count(None) != 1:
        return size
    from sefi_fast.pipelines.support import unwrap

    own = unwrap(pipe.unet).config.sample_size
    height, width = (own, own) if isinstance(own, int) else own
    return size[0] or width * pipe.vae_scale_factor, size[1] or height * pipe.vae_scale_factor


def _load(path: Path, size: tuple[int | None, int | None], multiple: int) -> Image.Image:
    """The image at the size wanted; where none is, at its own, cut to whole latent places."""
    from sefi_fast.training import load_image

    picture = load_image(path)
    width, height = (
        wanted or max(multiple, own // multiple * multiple)
        for wanted, own in zip(size, picture.size, strict=True)
    )
    return picture if picture.size == (width, height) else picture.resize((width, height))


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option --model, and those that go with it."""
    parser.add_argument(
        "-m", "--model", type=expanded,
        help="diffusers folder, hub id or .safetensors file (default: the bundled tiny model)",
    )  # fmt: skip
    parser.add_argument(
        "--model-config", metavar="FOLDER",
        help="for a model in one file: the diffusers folder of a model of the same architecture, "
        "for configurations and tokenizers, so that nothing is asked of the hub",
    )  # fmt: skip
    parser.add_argument(
        "--vae", help="another VAE than the model's: a folder, a hub id or a .safetensors file"
    )


def add_preset(parser: argparse.ArgumentParser) -> None:
    """The option --preset."""
    from sefi_fast.training.config import PRESETS

    parser.add_argument("--preset", help=f"settings by name: {', '.join(PRESETS)}")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """The prompt, in its place on the command line."""
    parser.add_argument("prompt", help="what to draw; a subject stands in it by its placeholder")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The subjects, and how to draw."""
    parser.add_argument(
        "-s", "--subject", action="append", default=[], metavar="FILE",
        help="a subject file, or '<me>=FILE' to call it <me> here; may be given several times",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument("--negative-prompt")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--seed", type=int, default=0)
    add_images(parser)


def add_config_fields(parser: argparse.ArgumentParser) -> None:
    """One option a field of TrainConfig, so that a new field is a new option by itself."""
    from sefi_fast.training import TrainConfig

    group = parser.add_argument_group("training settings")
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        name = "--" + field.name.replace("_", "-")
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f"config_{field.name}"}
        description = field.metadata.get("help", "")
        kind, repeated, optional = _option_type(hints[field.name])
        default = "" if field.default is None else f"(default: {_shown(field)})"
        keywords["help"] = f"{description} {default}".strip().replace("%", "%%")
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = _or_none(kind) if optional and kind is not str else kind
            keywords["metavar"] = field.name.split("_")[-1].upper()
            if repeated:
                keywords["nargs"] = "+"
        group.add_argument(name, **keywords)


def config_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig that the command line names."""
    return {
        name.removeprefix("config_"): tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name.startswith("config_")
    }


def attached_pipeline(
    options: argparse.Namespace, prompts: Sequence[str] | None = None
) -> tuple[Any, dict[str, Any]]:
    """The pipeline with the subjects attached, and the sampling settings to call it with.

    Options that do not go together are told before anything is imported that takes a second.

    prompts: what will be drawn, of which at least one must name a subject; default: the one prompt.
    """
    if options.number < 1:
        raise ValueError(f"--number is {options.number}: give 1 or more")
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps is {options.steps}: give 1 or more")
    check_pictures(options)
    from sefi_fast.errors import PromptError
    from sefi_fast.pipelines import attach
    from sefi_fast.pipelines.loading import kept_model
    from sefi_fast.tiny_world import SAMPLING

    keep_freed_memory_on_cpu()
    texts = [options.prompt] if prompts is None else list(prompts)
    named = [_named_file(text) for text in options.subject]
    subjects = _subjects(named)
    for subject in subjects:
        if not any(mentions(text, subject.placeholder) for text in texts):
            raise PromptError(
                f"{' and '.join(map(repr, texts))} does not name the subject "
                f"{subject.placeholder}: write it where the {subject.class_word} shall stand, or "
                "leave its file out"
            )
    wanted: dict[str, Any] = {
        "model": options.model,
        "config": options.model_config,
        "vae": options.vae,
    }
    giver = None
    if options.model is None and subjects:
        giver = named[0][1]
        kept = kept_model(subjects[0])
        wanted = {name: kept[name] if value is None else value for name, value in wanted.items()}
    model = wanted["model"]
    pipe = _pipeline(wanted, giver)
    _check_placeholders(pipe, [*texts, options.negative_prompt or ""], subjects)
    pipe, pictures = with_pictures(options, pipe)
    if subjects:
        attach(pipe, subjects)
    given = {
        "steps": options.steps,
        "guidance": options.guidance,
        "negative_prompt": options.negative_prompt,
        "seed": options.seed,
    }
    usual = dict(SAMPLING) if model is None else {}
    chosen = usual | {name: value for name, value in given.items() if value is not None}
    check_steps(chosen | pictures)
    return pipe, chosen | pictures


def _check_placeholders(pipe: Any, texts: Sequence[str], subjects: Sequence[Subject]) -> None:
    """Raise PromptError for a placeholder whose subject was not given."""
    from sefi_fast.errors import PromptError
    from sefi_fast.prompts.text_encoder import present_text_encoders
    from sefi_fast.prompts.tokenization import unknown_placeholders

    names = [subject.placeholder for subject in subjects]
    tokenizers = [encoder.tokenizer for encoder in present_text_encoders(pipe)]
    if unknown := unknown_placeholders(texts, names, tokenizers):
        words = " and ".join(unknown)
        given = ", ".join(map(repr, names)) or "none"
        raise PromptError(
            f"the prompt names {words}, but no subject of that name was given (given: "
            f"{given}): add the file of each with -s FILE, or -s '{unknown[0]}=FILE' "
            "if it was trained under another name"
        )


def _named_file(text: str) -> tuple[str | None, Path]:
    """FILE or NAME=FILE; a file whose own name has the sign is taken as it is."""
    named = re.fullmatch(r"(<[^<>]*>|[^=]*)=(.*)", text, re.DOTALL)
    if named is None or os.path.exists(os.path.expanduser(text)):
        return None, user_path(text)
    return named[1], user_path(named[2])


def _subjects(named: Sequence[tuple[str | None, Path]]) -> list[Subject]:
    """The subjects by the names they have here, each a name of its own."""
    from sefi_fast.subject import Subject

    subjects: list[Subject] = []
    files: dict[str, Path] = {}
    for name, path in named:
        subject = Subject.load(path)
        if name is not None:
            subject = dataclasses.replace(subject, placeholder=name)
        if (first := files.get(subject.placeholder)) is not None:
            raise ValueError(
                f"{first} and {path} both have the placeholder {subject.placeholder!r}: give one "
                f"another for this call, as -s '<other>={path}', or train it with --placeholder"
            )
        files[subject.placeholder] = path
        subjects.append(subject)
    return subjects


def _pipeline(wanted: dict[str, Any], giver: Path | None) -> Any:
    """The model's pipeline; `giver` is the subject file that names the model, if one does."""
    from sefi_fast.errors import ModelError
    from sefi_fast.pipelines import load_pipeline

    try:
        return load_pipeline(**wanted)
    except ModelError as error:
        if giver is None:
            raise
        raise ModelError(f"{error} (the model that {giver} names; give --model)") from error


def _shown(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _option_type(hint: Any) -> tuple[type, bool, bool]:
    """The type of one value of a field, whether it takes several, and whether it may be None."""
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
    """Read a value of this type, or the word none."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    # argparse names it in its error.
    read.__name__ = kind.__name__
    return read
