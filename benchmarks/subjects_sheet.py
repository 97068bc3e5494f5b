"""Train many drawn creatures side by side on the bundled model, and show each on one sheet.

python benchmarks/subjects_sheet.py --subjects 32 -o subjects_sheet

Interrupted, the same command goes on. The creatures are identities that the bundled model has never
seen; a judge that knows them by sight says for each how many of its five marks the images show.
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

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)

from _report import write_json, write_whole  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from sefi_fast import attach, detach, generate, load_pipeline, train_many  # noqa: E402
from sefi_fast.evaluation import Panel, contact_sheet  # noqa: E402
from sefi_fast.subject import Subject  # noqa: E402
from sefi_fast.tiny_world import CLASS_WORD, SAMPLING  # noqa: E402
from sefi_fast.tiny_world.captions import SCENE_PHRASES  # noqa: E402
from sefi_fast.tiny_world.drawing import (  # noqa: E402
    SCENES,
    Identity,
    ImageSpec,
    draw,
    held_out_identities,
)
from sefi_fast.tiny_world.judge import Judge, Judgement  # noqa: E402

IDENTITY_MARKS = ("colour", "second_colour", "pattern", "ears", "shape")
SUBJECTS_A_ROW = 4


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subjects", type=int, default=32)
    parser.add_argument("--batch-subjects", type=int, default=8, help="side by side")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--images", type=int, default=2, help="drawn of each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--panel", type=int, default=80, help="side of an image on the sheet")
    parser.add_argument("-o", "--output", type=Path, default=Path("subjects_sheet"), help="folder")
    options = parser.parse_args(arguments)
    most = len(held_out_identities())
    if not 1 <= options.subjects <= most:
        parser.error(f"--subjects {options.subjects}: there are 1 to {most} unseen identities")
    return options


def chosen_creatures(count: int, seed: int) -> list[tuple[Identity, str]]:
    """Unseen identities, each with the scene of its one image."""
    rng = random.Random(seed)
    held_out = held_out_identities()
    rng.shuffle(held_out)
    return [(identity, rng.choice(SCENES)) for identity in held_out[:count]]


def write_manifest(creatures: Sequence[tuple[Identity, str]], folder: Path) -> Path:
    """One image a creature and the CSV manifest that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class_word", "placeholder", "seed", "scene"])
    for number, (identity, scene) in enumerate(creatures):
        name = f"creature-{number:02d}.png"
        picture, _ = draw(ImageSpec(identity, scene), 192)
        write_whole(folder / name, lambda beside, picture=picture: picture.save(beside))
        writer.writerow([name, CLASS_WORD, f"<c{number}>", number, SCENE_PHRASES[scene]])
    path = folder / "manifest.csv"
    write_whole(path, lambda beside: beside.write_text(text.getvalue()))
    return path


def scenes_for(seen: str, count: int) -> list[str]:
    """Scenes that the creature's own image does not show."""
    others = [scene for scene in SCENES if scene != seen]
    return [others[number % len(others)] for number in range(count)]


def pictures_of(pipe: Any, subject: Subject, scenes: Sequence[str], seed: int) -> list[Image.Image]:
    """One image of the subject a scene."""
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
    """Mean over images of how many of the five marks the judge sees rightly."""
    right = [
        judgement.labels[mark] == (getattr(identity, mark) or "none")
        for judgement in judgements
        for mark in IDENTITY_MARKS
    ]
    return sum(right) / len(judgements)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, draw, judge; leaves sheet.png and sheet.json in the folder."""
    creatures = chosen_creatures(options.subjects, options.seed)
    manifest = write_manifest(creatures, options.output / "pictures")
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
            raise RuntimeError(f"{result.name} was not learnt") from result.error
        drawn = pictures_of(pipe, result.subject, scenes_for(scene, options.pictures), options.seed)
        marks = marks_shown(identity, judge(drawn))
        given = Image.open(options.output / "pictures" / f"{result.name}.png")
        panels.append([Panel(given, "given"), *(Panel(one, f"{marks:.1f}/5") for one in drawn)])
        found.append({"name": result.name, "marks": round(marks, 2), **vars(identity)})
    rows = [
        ("", [panel for group in panels[start : start + SUBJECTS_A_ROW] for panel in group])
        for start in range(0, len(panels), SUBJECTS_A_ROW)
    ]
    mean = sum(one["marks"] for one in found) / len(found)
    title = f"{len(found)} creatures from one image each, in other scenes: {mean:.1f} of 5 marks"
    sheet = contact_sheet(rows, title=title, panel_size=options.panel)
    # A palette is a third of the size, and drawings have few colours.
    small = sheet.quantize(256, dither=Image.Dither.NONE)
    path = options.output / "sheet.png"
    write_whole(path, lambda beside: small.save(beside, optimize=True))
    report = {
        "settings": {"steps": options.steps, "batch_size": options.batch_size},
        "mean_marks_of_5": round(mean, 2),
        "subjects": found,
    }
    write_json(options.output / "sheet.json", report)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when every creature was learnt."""
    options = parse(arguments)
    report = run(options)
    print(json.dumps({"mean_marks_of_5": report["mean_marks_of_5"]}))
    print(f"wrote {options.output / 'sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
