"""`sefi-fast demo`: train the bundled subject and show it."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sefi_fast.cli.options import check_kept, report
from sefi_fast.utils.files import atomic_write, check_folder, user_path
from sefi_fast.utils.malloc import keep_freed_memory_on_cpu

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from sefi_fast.evaluation import Panel


PLACEHOLDER = "<it>"
SCENE_PROMPTS = (
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} in the forest",
    "a photo of a {} in the city",
)
ACCESSORY_PROMPTS = (
    "a photo of a {} with a hat in the forest",
    "a photo of a {} with a ball in the snow",
    "a photo of a {} with a crown on the beach",
    "a photo of a {} with a scarf at night",
)
PICTURES_PER_PROMPT = 2
FILES = {
    "subject": "subject.safetensors",
    "sheet": "sheet.png",
    "maps": "attention.png",
    "curves": "training.png",
    "record": "demo.json",
}
"""What the demo leaves in its folder; the command asks before it imports what draws."""


class DemoResult(NamedTuple):
    """Files that the demo left, and how long it took in seconds."""

    subject: Path
    sheet: Path
    maps: Path
    curves: Path
    seconds: float


def run_demo(
    output: str | Path = "sefi_fast_demo",
    *,
    image: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **overrides: Any,
) -> DemoResult:
    """Personalise the bundled tiny model on one image, generate, and draw three PNG sheets.

    Args:
        output: folder for the subject file and the images; made when missing.
        image: an image to learn; default: the bundled one, a creature no model has seen.
        seed: of the training run and of the generated images.
        progress: show progress bars.
        **overrides: fields of `TrainConfig`, for example ``steps=100``.

    Raises:
        ImageError: the image cannot be read.
        OSError: the folder cannot be written.
    """
    from sefi_fast.evaluation import Panel, contact_sheet, training_curves
    from sefi_fast.evaluation.sheets import png
    from sefi_fast.pipelines import attach, detach, generate, load_pipeline
    from sefi_fast.tiny_world import CLASS_WORD, SAMPLING, SUBJECT_SCENE, bundled_subject_image
    from sefi_fast.tiny_world.captions import SCENE_PHRASES
    from sefi_fast.training import load_image, train

    started = time.perf_counter()
    folder = check_folder(output)
    picture = load_image(image or bundled_subject_image())
    if image is None:
        # Naming the scene keeps it out of the subject.
        overrides = {"scene": SCENE_PHRASES[SUBJECT_SCENE], **overrides}
    # A minute's work is begun anew rather than resumed.
    overrides = {"checkpoint_every": 0, **overrides}
    paths = {name: folder / file for name, file in FILES.items()}
    subject = train(
        image=picture,
        placeholder=PLACEHOLDER,
        output=paths["subject"],
        progress=progress,
        seed=seed,
        **overrides,
    )
    if subject.history is not None:
        curves = training_curves(subject.history, title="one image, bundled model")
        atomic_write(paths["curves"], png(curves))

    pipe = load_pipeline(None)
    pipe.set_progress_bar_config(disable=True)

    def panels(prompts: tuple[str, ...], word: str) -> list[Panel]:
        return [
            Panel(drawn, sentence)
            for sentence in (prompt.format(word) for prompt in prompts)
            for drawn in generate(pipe, sentence, n=PICTURES_PER_PROMPT, seed=seed, **SAMPLING)
        ]

    plain = panels(SCENE_PROMPTS, CLASS_WORD)
    attach(pipe, subject)
    try:
        rows = [
            ("the one image given", [Panel(picture)]),
            (f"the plain class word, '{CLASS_WORD}': some other one each time", plain),
            (
                f"the subject, '{PLACEHOLDER}', in scenes it was not seen in",
                panels(SCENE_PROMPTS, PLACEHOLDER),
            ),
            ("the subject with accessories", panels(ACCESSORY_PROMPTS, PLACEHOLDER)),
        ]
        sheet = contact_sheet(rows, title="sefi_fast: one image in, the subject anywhere")
        atomic_write(paths["sheet"], png(sheet))
        _draw_maps(pipe, seed, paths["maps"])
    finally:
        detach(pipe)
    seconds = time.perf_counter() - started
    record = {"seconds": round(seconds, 1), "seed": seed, "settings": subject.settings}
    atomic_write(paths.pop("record"), json.dumps(record).encode())
    return DemoResult(**paths, seconds=seconds)


def _draw_maps(pipe: StableDiffusionPipeline, seed: int, path: Path) -> None:
    """Draw where the placeholder and the accessory's word looked, over the images they made."""
    from sefi_fast.evaluation import Panel, contact_sheet
    from sefi_fast.evaluation.sheets import png
    from sefi_fast.pipelines import generate, trace
    from sefi_fast.tiny_world import SAMPLING

    rows = []
    for template, word in zip(ACCESSORY_PROMPTS, ("hat", "ball", "crown", "scarf"), strict=True):
        prompt = template.format(PLACEHOLDER)
        with trace(pipe, words=[PLACEHOLDER, word]) as traced:
            pictures = generate(pipe, prompt, n=1, seed=seed, **SAMPLING)
        row = [
            Panel(pictures[0], prompt),
            Panel(traced.overlay(pictures[0], PLACEHOLDER), f"where '{PLACEHOLDER}' looks"),
            Panel(traced.overlay(pictures[0], word), f"where '{word}' looks"),
        ]
        rows.append(("", row))
    sheet = contact_sheet(rows, title="attention of chosen words", panel_size=192)
    atomic_write(path, png(sheet))


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "demo", help="personalise the bundled model on a bundled image; no download, no GPU"
    )
    parser.add_argument("--image", type=user_path, help="another image than the bundled one")
    parser.add_argument(
        "-o",
        "--output",
        type=user_path,
        default=Path("sefi_fast_demo"),
        help="folder for the images",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps (default: the library's)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    check_folder(options.output, make=False)
    check_kept((options.output / name for name in FILES.values()), [options.image])
    pass  # MOVED

    keep_freed_memory_on_cpu()
    overrides = {} if options.steps is None else {"steps": options.steps}
    result = run_demo(options.output, image=options.image, seed=options.seed, **overrides)
    report(f"{result.sheet}: the subject in new scenes and with accessories")
    report(f"{result.maps}: where the words looked")
    report(f"{result.curves}: the training curves")
    report(f"{result.subject}: the subject, to attach to the bundled model")
    report(f"done in {result.seconds:.0f} s")
    return 0
