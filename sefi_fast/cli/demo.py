"""`sefi-fast demo`: train the bundled subject and show it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sefi_fast.cli.options import Commands, check_kept, report
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
ACCESSORY_PROMPTS = {
    "hat": "a photo of a {} with a hat in the forest",
    "ball": "a photo of a {} with a ball in the snow",
    "crown": "a photo of a {} with a crown on the beach",
    "scarf": "a photo of a {} with a scarf at night",
}
IMAGES_PER_PROMPT = 2
# The files of the demo in the order in which they are printed.
_SHOWN = {
    "sheet": "the subject in new scenes and with accessories",
    "maps": "attention of the placeholder and the accessories",
    "curves": "the training curves",
    "subject": "the subject, to attach to the bundled model",
}
FILES = {
    "subject": "subject.safetensors",
    "sheet": "sheet.png",
    "maps": "attention.png",
    "curves": "training.png",
    "record": "demo.json",
}


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo", help="personalise the bundled model on a bundled image; no download, no GPU"
    )
    parser.add_argument("--image", type=user_path, help="an image in place of the bundled one")
    parser.add_argument(
        "-o", "--output", type=user_path, default=Path("sefi_fast_demo"),
        help="folder for the images (default: sefi_fast_demo)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of training and images")
    parser.add_argument("--steps", type=int, help="training steps (default: the library's)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    overrides = {} if options.steps is None else {"steps": options.steps}
    seconds = run_demo(options.output, image=options.image, seed=options.seed, **overrides)
    for name, what in _SHOWN.items():
        report(f"{options.output / FILES[name]}: {what}")
    report(f"done in {seconds:.0f} s")
    return 0


def run_demo(
    output: str | Path = "sefi_fast_demo",
    *,
    image: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **overrides: Any,
) -> float:
    """Train the bundled model on one image, save FILES, and return the time in seconds.

    `overrides` are fields of `TrainConfig`, and the bundled image takes the place of a missing one.
    """
    folder = check_folder(output, make=False)
    paths = {name: folder / file for name, file in FILES.items()}
    check_kept(paths.values(), [image])
    from sefi_fast.evaluation import Panel, contact_sheet, training_curves
    from sefi_fast.evaluation.sheets import png
    from sefi_fast.pipelines import attach, detach, generate, load_pipeline
    from sefi_fast.tiny_world import CLASS_WORD, SAMPLING, SUBJECT_SCENE, bundled_subject_image
    from sefi_fast.tiny_world.captions import SCENE_PHRASES
    from sefi_fast.training import load_image, train

    keep_freed_memory_on_cpu()
    started = time.perf_counter()
    source = load_image(image or bundled_subject_image())
    if image is None:
        # Naming the scene keeps it out of the subject.
        overrides = {"scene": SCENE_PHRASES[SUBJECT_SCENE], **overrides}
    # A run of a minute starts again instead of resuming.
    overrides = {"checkpoint_every": 0, "seed": seed, **overrides}
    subject = train(
        source, placeholder=PLACEHOLDER, output=paths["subject"], progress=progress, **overrides
    )
    if subject.history is not None:
        curves = training_curves(subject.history, title="one image, bundled model")
        atomic_write(paths["curves"], png(curves))

    pipe = load_pipeline(None)
    pipe.set_progress_bar_config(disable=True)

    def panels(templates: Iterable[str], word: str) -> list[Panel]:
        return [
            Panel(generated, prompt)
            for prompt in (template.format(word) for template in templates)
            for generated in generate(pipe, prompt, n=IMAGES_PER_PROMPT, seed=seed, **SAMPLING)
        ]

    plain = panels(SCENE_PROMPTS, CLASS_WORD)
    attach(pipe, subject)
    try:
        rows = [
            ("the one image given", [Panel(source)]),
            (f"the plain class word, '{CLASS_WORD}': another one in each image", plain),
            (f"the subject, '{PLACEHOLDER}', in new scenes", panels(SCENE_PROMPTS, PLACEHOLDER)),
            ("the subject with accessories", panels(ACCESSORY_PROMPTS.values(), PLACEHOLDER)),
        ]
        sheet = contact_sheet(rows, title="sefi_fast: one image in, the subject anywhere")
        atomic_write(paths["sheet"], png(sheet))
        atomic_write(paths["maps"], _attention_sheet(pipe, seed))
    finally:
        detach(pipe)
    seconds = time.perf_counter() - started
    record = {"seconds": round(seconds, 1), "seed": seed, "settings": subject.settings}
    atomic_write(paths["record"], json.dumps(record).encode())
    return seconds


def _attention_sheet(pipe: StableDiffusionPipeline, seed: int) -> bytes:
    """Return a PNG sheet of the attention to the placeholder and to each accessory's word."""
    from sefi_fast.evaluation import Panel, contact_sheet
    from sefi_fast.evaluation.sheets import png
    from sefi_fast.pipelines import generate, trace
    from sefi_fast.tiny_world import SAMPLING

    rows = []
    for word, template in ACCESSORY_PROMPTS.items():
        prompt = template.format(PLACEHOLDER)
        with trace(pipe, words=[PLACEHOLDER, word]) as traced:
            (image,) = generate(pipe, prompt, n=1, seed=seed, **SAMPLING)
        row = [Panel(image, prompt)]
        row += [Panel(traced.overlay(image, w), f"attention to '{w}'") for w in (PLACEHOLDER, word)]
        rows.append(("", row))
    return png(contact_sheet(rows, title="attention to chosen words", panel_size=192))
