"""Options that several subcommands share."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sefi_fast.cli.pictures import add_pictures, check_pictures, check_steps, with_pictures
from sefi_fast.host_memory import keep_freed_memory_on_cpu
from sefi_fast.utils.files import expanded, user_path
from sefi_fast.utils.words import mentions

if TYPE_CHECKING:
    from sefi_fast.subject import Subject


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
    from sefi_fast.training.presets import PRESETS

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
    add_pictures(parser)


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
    from sefi_fast.pipelines.unknown_placeholders import names_of, unknown_placeholders

    if unknown := unknown_placeholders(pipe, texts, subjects):
        words = " and ".join(unknown)
        raise PromptError(
            f"the prompt names {words}, but no subject of that name was given (given: "
            f"{names_of(subjects)}): add the file of each with -s FILE, or -s '{unknown[0]}=FILE' "
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
