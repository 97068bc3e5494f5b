"""The command `sefi-fast`: train, generate, maps, info and demo."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sefi_fast import __version__
from sefi_fast.errors import SefiError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 1 for an expected error, 130 when stopped."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (SefiError, ValueError, TypeError, OSError) as error:
        print(f"sefi-fast {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"sefi-fast {options.command}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sefi-fast", description="Personalise a diffusion model from one picture (SeFi-IDE)."
    )
    parser.add_argument("--version", action="version", version=f"sefi_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="learn a subject from one picture")
    train.add_argument("image", type=Path, help="the picture")
    _add_model(train)
    train.add_argument("--class-word", help="what the subject is, one token: person, cat, car …")
    train.add_argument("--placeholder", default="<it>", help="its name in prompts (default: <it>)")
    train.add_argument(
        "-o", "--output", type=Path, default=Path("subject.safetensors"), help="the subject file"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_config_fields(train)
    train.set_defaults(run=_train)

    generate = commands.add_parser("generate", help="make pictures from a prompt")
    _add_sampling(generate)
    generate.add_argument("-n", "--number", type=int, default=4, help="how many (default: 4)")
    generate.add_argument(
        "-o", "--output", type=Path, default=Path("pictures"), help="folder for the PNG files"
    )
    generate.set_defaults(run=_generate)

    maps = commands.add_parser("maps", help="draw where chosen words of a prompt look")
    _add_sampling(maps)
    maps.add_argument("-w", "--words", nargs="+", required=True, help="words of the prompt")
    maps.add_argument("-o", "--output", type=Path, default=Path("maps.png"), help="the PNG file")
    maps.set_defaults(run=_maps)

    info = commands.add_parser("info", help="versions, the machine, and which backends run here")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo", help="personalise the bundled model on a bundled picture; no download, no GPU"
    )
    demo.add_argument("--image", type=Path, help="another picture than the bundled one")
    demo.add_argument(
        "-o", "--output", type=Path, default=Path("sefi_fast_demo"), help="folder for the pictures"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=int, help="training steps (default: the library's)")
    demo.set_defaults(run=_demo)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model",
        help="diffusers folder, hub id or .safetensors file (default: the bundled tiny model)",
    )  # fmt: skip


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to draw; a subject stands in it by its placeholder")
    parser.add_argument(
        "-s", "--subject", type=Path, action="append", default=[], metavar="FILE",
        help="a subject file; may be given several times",
    )  # fmt: skip
    _add_model(parser)
    parser.add_argument("--negative-prompt")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--seed", type=int, default=0)


def _add_config_fields(parser: argparse.ArgumentParser) -> None:
    """One option a field of TrainConfig, so that a new field is a new option by itself."""
    from sefi_fast.training import TrainConfig

    group = parser.add_argument_group("training settings")
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        name = "--" + field.name.replace("_", "-")
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f"config_{field.name}"}
        description = field.metadata.get("help", "")
        kind, repeated = _option_type(hints[field.name])
        default = "" if field.default is None else f"(default: {_shown(field)})"
        keywords["help"] = f"{description} {default}".strip().replace("%", "%%")
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = kind
            keywords["metavar"] = field.name.split("_")[-1].upper()
            if repeated:
                keywords["nargs"] = "+"
        group.add_argument(name, **keywords)


def _shown(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _option_type(hint: Any) -> tuple[type, bool]:
    """The type of one value of a field, and whether it takes several."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return str, False
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _train(options: argparse.Namespace) -> int:
    from sefi_fast.training import train

    overrides: dict[str, Any] = {
        name.removeprefix("config_"): tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name.startswith("config_")
    }
    subject = train(
        image=options.image,
        model=options.model,
        class_word=options.class_word,
        placeholder=options.placeholder,
        output=options.output,
        progress=not options.quiet,
        **overrides,
    )
    if subject.history is not None:
        from sefi_fast.evaluation import training_curves

        curves = options.output.with_suffix(".png")
        training_curves(subject.history, title=options.image.name).save(curves)
        print(f"{curves}: the loss")
        if subject.history.validation:
            _save_validation(options, subject.history.validation)
    print(f"{options.output}: use it as {options.placeholder} in a prompt")
    return 0


def _save_validation(options: argparse.Namespace, drawn: Sequence[tuple[int, list[Any]]]) -> None:
    from sefi_fast.evaluation import Panel, contact_sheet

    sentences = options.config_validation_prompts
    prompts = [sentence.replace("{}", options.placeholder) for sentence in sentences]
    rows = [(f"step {step}", list(map(Panel, pictures, prompts))) for step, pictures in drawn]
    path = options.output.with_name(options.output.stem + "-validation.png")
    contact_sheet(rows).save(path)
    print(f"{path}: the validation prompts as training went on")


def _attached_pipeline(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline with the subjects attached, and the sampling settings to call it with."""
    from sefi_fast.errors import PromptError
    from sefi_fast.pipelines import attach, load_pipeline
    from sefi_fast.subject import Subject
    from sefi_fast.tiny_world import SAMPLING

    subjects = [Subject.load(path) for path in options.subject]
    if subjects and not any(subject.placeholder in options.prompt for subject in subjects):
        names = ", ".join(subject.placeholder for subject in subjects)
        raise PromptError(
            f"the prompt {options.prompt!r} names none of its subjects: write {names} where the "
            "subject shall stand"
        )
    model = options.model
    if model is None and subjects:
        model = subjects[0].settings.get("model")
    pipe = load_pipeline(model)
    if subjects:
        attach(pipe, subjects)
    given = {
        "steps": options.steps,
        "guidance": options.guidance,
        "negative_prompt": options.negative_prompt,
        "seed": options.seed,
    }
    usual = dict(SAMPLING) if model is None else {}
    return pipe, usual | {name: value for name, value in given.items() if value is not None}


def _generate(options: argparse.Namespace) -> int:
    from sefi_fast.pipelines import generate

    if options.number < 1:
        raise ValueError(f"--number is {options.number}: give 1 or more")
    pipe, sampling = _attached_pipeline(options)
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = generate(pipe, options.prompt, n=options.number, **sampling)
    for index, picture in enumerate(pictures):
        path = options.output / f"{options.seed + index:05d}.png"
        picture.save(path)
        print(path)
    return 0


def _maps(options: argparse.Namespace) -> int:
    from sefi_fast.evaluation import Panel, contact_sheet
    from sefi_fast.pipelines import generate, trace

    pipe, sampling = _attached_pipeline(options)
    with trace(pipe, words=options.words) as traced:
        picture = generate(pipe, options.prompt, n=1, **sampling)[0]
    panels = [Panel(picture, options.prompt)]
    panels += [Panel(traced.overlay(picture, word), word) for word in options.words]
    contact_sheet([("", panels)], panel_size=256).save(options.output)
    print(options.output)
    return 0


def _info(options: argparse.Namespace) -> int:
    from sefi_fast.info import report

    print(report())
    return 0


def _demo(options: argparse.Namespace) -> int:
    from sefi_fast.demo import run_demo

    overrides = {} if options.steps is None else {"steps": options.steps}
    result = run_demo(options.output, image=options.image, seed=options.seed, **overrides)
    print(f"{result.sheet}: the subject in new scenes and with accessories")
    print(f"{result.maps}: where the words looked")
    print(f"{result.curves}: the training curves")
    print(f"{result.subject}: the subject, to attach to the bundled model")
    print(f"done in {result.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
