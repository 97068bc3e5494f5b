"""What the evaluation of finished subjects found, and its files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sefi_fast.evaluation.sheets import Panel, contact_sheet, png
from sefi_fast.evaluation.statistics import bootstrap
from sefi_fast.utils.files import atomic_write

CONTROL = "class word"
"""Name of the rows whose pictures have the class word in the subject's place."""
_TEXT_COLUMNS = ("subject", "kind", "prompt", "seed")
_PANELS_A_ROW = 8


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        rows: one a picture: subject, kind, prompt, seed, and each score by name. "prompt score" and
            "id" are of the bundled model's judge; "clip text", "clip image", "dino image" and
            "face" are cosine similarities; "id(p)" is ID · Prompt, which is our reading, with the
            judge's scores, or else the face's, DINO's or CLIP's image score times CLIP's text.
        files: what was written.
    """

    rows: tuple[dict[str, Any], ...]
    files: tuple[Path, ...]

    @property
    def scores(self) -> list[str]:
        """Names of the scores."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in _TEXT_COLUMNS]

    def mean(self, score: str, subject: str, kind: str | None = None) -> float | None:
        """Mean over a subject's pictures, of one kind or all; None if it has none."""
        values = [
            row[score]
            for row in self.rows
            if row["subject"] == subject and kind in (None, row["kind"]) and score in row
        ]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Drawn:
    """The pictures of one prompt with some subjects, or with their class words.

    Attributes:
        name: of the subjects together, or CONTROL.
        kind: class of the prompt.
        prompt: {} where a subject stands.
        subjects: places of the subjects in the list given.
        control: whether the class words stand in their place.
    """

    name: str
    kind: str
    prompt: str
    subjects: tuple[int, ...]
    control: bool


def write_evaluation(
    folder: Path,
    found: Evaluation,
    shown: Sequence[tuple[Drawn, Image.Image]],
    names: Sequence[str],
) -> list[Path]:
    """Write scores (CSV), the means (Markdown) and a sheet with the first picture of each prompt.

    Args:
        folder: where to.
        found: the scores.
        shown: a picture of each job.
        names: of the subjects, without those of pairs.

    Returns:
        The files.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*_TEXT_COLUMNS, *found.scores], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows)
    rows: dict[str, list[Panel]] = {}
    for job, image in shown:
        rows.setdefault(job.name, []).append(Panel(image, job.prompt))
    cut = [
        (name if start == 0 else "", panels[start : start + _PANELS_A_ROW])
        for name, panels in rows.items()
        for start in range(0, len(panels), _PANELS_A_ROW)
    ]
    sheet = contact_sheet(cut, title="first seed, nothing picked")
    contents = {
        "scores.csv": stream.getvalue().encode(),
        "scores.md": _markdown(found, names).encode(),
        "sheet.png": png(sheet),
    }
    for name, content in contents.items():
        atomic_write(folder / name, content)
    return [folder / name for name in contents]


def _markdown(found: Evaluation, names: Sequence[str]) -> str:
    """The mean of each score: control, all subjects with an interval, each kind, each subject."""
    scores, kinds = found.scores, list(dict.fromkeys(row["kind"] for row in found.rows))
    lines = [f"| pictures of | {' | '.join(scores)} |", "|" + "---|" * (len(scores) + 1)]

    def add(title: str, cells: Iterable[str]) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} |")

    def number(value: float | None) -> str:
        return "—" if value is None else f"{value:.3f}"

    def over_subjects(score: str, kind: str | None = None) -> str:
        means = {place: found.mean(score, name, kind) for place, name in enumerate(names)}
        known = {place: mean for place, mean in means.items() if mean is not None}
        return str(bootstrap(known)) if known else "—"

    add(f"the {CONTROL}", (number(found.mean(score, CONTROL)) for score in scores))
    add("all subjects", (over_subjects(score) for score in scores))
    for kind in kinds:
        add(f"all subjects, {kind}", (over_subjects(score, kind) for score in scores))
    for name in dict.fromkeys(row["subject"] for row in found.rows if row["subject"] != CONTROL):
        add(name, (number(found.mean(score, name)) for score in scores))
    return "\n".join(lines) + "\n"
