"""Train many drawn creatures together on the bundled model, and show all on one sheet.

python benchmarks/subjects_sheet.py --subjects 32 -o subjects_sheet

After an interruption the same command continues. The bundled model was not trained on these
creatures. A classifier counts how many of the five marks of each the generated images show.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.report import write_json, write_whole
from PIL import Image
from tqdm import tqdm

from sefi_fast import attach, detach, generate, load_pipeline, train_many
from sefi_fast.evaluation import Panel, contact_sheet
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD, SAMPLING
from sefi_fast.tiny_world.captions import SCENE_PHRASES
from sefi_fast.tiny_world.drawing import SCENES, Identity, ImageSpec, draw, held_out_identities
from sefi_fast.tiny_world.judge import Judge, Judgement

IDENTITY_MARKS = ("colour", "second_colour", "pattern", "ears", "shape")
SUBJECTS_A_ROW = 4


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subjects", type=int, default=32)
    parser.add_argument("--batch-subjects", type=int, default=8, help="trained together")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--images", type=int, default=2, help="generated of each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--panel", type=int, default=80, help="side of an image on the sheet")
    parser.add_argument("-o", "--output", type=Path, default=Path("subjects_sheet"), help="folder")
    options = parser.parse_args(arguments)
    most = len(held_out_identities())
    if not 1 <= options.subjects <= most:
        parser.error(f"--subjects {options.subjects}: wanted 1 to {most} unseen identities")
    return options


def chosen_creatures(count: int, seed: int) -> list[tuple[Identity, str]]:
    """Return unseen identities, each with the scene of its one image."""
    rng = random.Random(seed)
    held_out = held_out_identities()
    rng.shuffle(held_out)
    return [(identity, rng.choice(SCENES)) for identity in held_out[:count]]


def write_manifest(creatures: Sequence[tuple[Identity, str]], folder: Path) -> Path:
    """Write one image a creature and the CSV manifest that names them; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class_word", "placeholder", "seed", "scene"])
    for number, (identity, scene) in enumerate(creatures):
        name = f"creature-{number:02d}.png"
        image, _ = draw(ImageSpec(identity, scene), 192)
        write_whole(folder / name, image.save)
        writer.writerow([name, CLASS_WORD, f"<c{number}>", number, SCENE_PHRASES[scene]])
    path = folder / "manifest.csv"
    write_whole(path, lambda temporary: temporary.write_text(text.getvalue()))
    return path


def scenes_for(seen: str, count: int) -> list[str]:
    """Return scenes that the creature's training image does not show."""
    others = [scene for scene in SCENES if scene != seen]
    return [others[number % len(others)] for number in range(count)]


def images_of(pipe: Any, subject: Subject, scenes: Sequence[str], seed: int) -> list[Image.Image]:
    """Generate one image of the subject for each scene."""
    attach(pipe, subject)
    try:
        return [
            generate(
                pipe,
                f"a photo of a {subject.placeholder} {SCENE_PHRASES[scene]}",
                n=1,
                seed=seed,
                **SAMPLING,
            )[0]
            for scene in scenes
        ]
    finally:
        detach(pipe)


def marks_shown(identity: Identity, judgements: Sequence[Judgement]) -> float:
    """Return the mean number of the five marks that the judge finds in an image."""
    right = [
        judgement.labels[mark] == (getattr(identity, mark) or "none")
        for judgement in judgements
        for mark in IDENTITY_MARKS
    ]
    return sum(right) / len(judgements)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, generate and judge; write sheet.png and sheet.json."""
    creatures = chosen_creatures(options.subjects, options.seed)
    manifest = write_manifest(creatures, options.output / "images")
    results = train_many(
        manifest,
        output=options.output / "subjects",
        batch_subjects=options.batch_subjects,
        steps=options.steps,
        batch_size=options.batch_size,
    )
    pipe = load_pipeline(None)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.load()
    panels: list[list[Panel]] = []
    found: list[dict[str, Any]] = []
    pairs = zip(creatures, results, strict=True)
    for (identity, scene), result in tqdm(pairs, total=len(results), unit="creature"):
        if result.subject is None:
            raise RuntimeError(f"{result.name} was not trained") from result.error
        images = images_of(pipe, result.subject, scenes_for(scene, options.images), options.seed)
        marks = marks_shown(identity, judge(images))
        given = Image.open(options.output / "images" / f"{result.name}.png")
        panels.append([Panel(given, "given"), *(Panel(one, f"{marks:.1f}/5") for one in images)])
        found.append({"name": result.name, "marks": round(marks, 2), **vars(identity)})
    rows = [
        ("", [panel for group in panels[start : start + SUBJECTS_A_ROW] for panel in group])
        for start in range(0, len(panels), SUBJECTS_A_ROW)
    ]
    mean = sum(one["marks"] for one in found) / len(found)
    title = f"{len(found)} creatures from one image each, in other scenes: {mean:.1f} of 5 marks"
    sheet = contact_sheet(rows, title=title, panel_size=options.panel)
    # A palette takes a third of the bytes, and drawings have few colors.
    small = sheet.quantize(256, dither=Image.Dither.NONE)
    path = options.output / "sheet.png"
    write_whole(path, lambda temporary: small.save(temporary, optimize=True))
    report = {
        "settings": {"steps": options.steps, "batch_size": options.batch_size},
        "mean_marks_of_5": round(mean, 2),
        "subjects": found,
    }
    write_json(options.output / "sheet.json", report)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when every creature was trained."""
    options = parse(arguments)
    report = run(options)
    print(json.dumps({"mean_marks_of_5": report["mean_marks_of_5"]}))
    print(f"wrote {options.output / 'sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
