"""A sample of a study's pictures with what the judge says of them, for a person to check."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from sefi_fast.evaluation.results import Results
from sefi_fast.evaluation.sheets import Panel, contact_sheet
from sefi_fast.tiny_world.drawing import ACCESSORIES
from sefi_fast.tiny_world.judge import Judge, Judgement
from sefi_fast.training.image import load_image

_COLUMNS = 8


def judge_sheet(results: Results, count: int = 48, seed: int = 0) -> Image.Image | None:
    """Draw random pictures of all variants, each over the judge's verdict; None if there are none.

    Whether the judge reads generated pictures as a person would is to be seen here; its accuracy on
    drawings is in docs/tiny-world.md.

    Args:
        results: of the study.
        count: most pictures.
        seed: of the choice.
    """
    folder = results.folder / "pictures"
    name = f"{results.protocol.model}-s{results.protocol.seed}-*.png"
    strips = [path for key in sorted(results.found) for path in sorted((folder / key).glob(name))]
    places = [(path, k) for path in strips for k in range(results.protocol.prompts)]
    random.Random(seed).shuffle(places)
    images = [_cut(path, place) for path, place in places[:count]]
    if not images:
        return None
    panels = [
        Panel(image, verdict(judgement))
        for image, judgement in zip(images, Judge.load()(images), strict=True)
    ]
    rows = [("", panels[start : start + _COLUMNS]) for start in range(0, len(panels), _COLUMNS)]
    title = f"what the judge says of {len(panels)} random pictures of the study"
    return contact_sheet(rows, title=title, panel_size=120)


def verdict(judgement: Judgement) -> str:
    """All that the judge sees, in a line."""
    labels = judgement.labels
    if labels["creature"] == "no":
        return f"no creature, {labels['scene']}"
    coat = f"{labels['colour']} {labels['pattern']}"
    if labels["second_colour"] != "none":
        coat = f"{labels['colour']}/{labels['second_colour']} {labels['pattern']}"
    parts = [coat, f"{labels['ears']} ears", labels["shape"]]
    parts += [name for name in ACCESSORIES if labels[name] == "yes"]
    return ", ".join([*parts, labels["scene"], labels["position"]])


def _cut(path: Path, place: int) -> Image.Image:
    strip = load_image(path)
    side = strip.height
    return strip.crop((side * place, 0, side * (place + 1), side))
