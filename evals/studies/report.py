"""Tables, plots and sheets of a study."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from evals.studies.plots import plot_study
from evals.studies.results import Results
from evals.studies.tasks import Task, images_of
from evals.studies.variants import BASELINE, CONTROLS, Study, Variant
from sefi_fast.evaluation import Panel, contact_sheet
from sefi_fast.evaluation.sheets import png
from sefi_fast.evaluation.statistics import Interval, bootstrap, paired_difference
from sefi_fast.evaluation.tables import csv_bytes, markdown_table, write_files
from sefi_fast.tiny_world.drawing import ACCESSORIES, draw
from sefi_fast.tiny_world.judge import Judge, Judgement

_SCORED = ("id", "rank", "prompt", "share", "id_p", "leak", "open_leak", "open_id")
_MEASURED = ("inside", "class_inside", "correlation", "taken", "final_loss", "final_subject_loss",
             "seconds")  # fmt: skip
_TITLES = {"id": "ID", "prompt": "Prompt", "id_p": "ID(P)"}
_SHEET_IDENTITIES = 3
_SHEET_PROMPTS = 6
_JUDGED_IMAGES = 48
_JUDGE_COLUMNS = 8


def write_report(
    folder: Path, studies: Sequence[Study], results: Results, baseline: Variant
) -> list[Path]:
    """Write a CSV, a short table (Markdown), a plot and a sheet of each study.

    Args:
        folder: folder of the files.
        studies: the studies.
        results: the scores so far.
        baseline: the variant that differences are taken to.

    Returns:
        The files.

    Raises:
        OSError: a file cannot be written.
    """
    contents: dict[str, bytes] = {}
    for study in studies:
        every = [*(Variant(name, None) for name in CONTROLS), *study.variants]
        shown = [variant for variant in every if results.numbers(variant)]
        if not shown:
            continue
        rows = [_cells(variant, results, baseline) for variant in shown]
        contents[f"{study.name}.csv"] = csv_bytes(rows)
        contents[f"{study.name}.md"] = _markdown(study, shown, results, baseline).encode()
        images = {"": plot_study(study, results), "-sheet": _sheet(folder, study, shown, results)}
        for suffix, image in images.items():
            if image is not None:
                contents[f"{study.name}{suffix}.png"] = png(image)
    verdicts = judge_sheet(results)
    if verdicts is not None:
        contents["judge-sheet.png"] = png(verdicts)
    return write_files(folder, contents)


def _difference(
    variant: Variant, score: str, results: Results, baseline: Variant
) -> Interval | None:
    values, before = results.values(variant, score), results.values(baseline, score)
    if variant.key == baseline.key or not values.keys() & before.keys():
        return None
    return paired_difference(values, before)


def _cells(variant: Variant, results: Results, baseline: Variant) -> dict[str, str]:
    """Return column → text: scores, differences, and means of each kind of prompt."""
    columns: dict[str, Interval | None] = {}
    for score in (*_SCORED, *_MEASURED):
        values = results.values(variant, score)
        columns[score] = bootstrap(values) if values else None
        if score in _SCORED:
            columns[f"{score} − {BASELINE}"] = _difference(variant, score, results, baseline)
    cells = {"variant": variant.name}
    for name, interval in columns.items():
        numbers = interval[:3] if interval else (None,) * 3
        for suffix, number in zip(("", " low", " high"), numbers, strict=True):
            cells[name + suffix] = "" if number is None else f"{number:.5g}"
    for kind in results.kinds():
        for score in ("id", "prompt"):
            values = results.values(variant, score, [kind])
            cells[f"{score}, {kind}"] = (
                f"{sum(values.values()) / len(values):.5g}" if values else ""
            )
    return cells | {"identities": str(len(results.numbers(variant)))}


def _markdown(study: Study, shown: Sequence[Variant], results: Results, baseline: Variant) -> str:
    protocol = results.protocol
    titles = ["variant", "identities", *_TITLES.values()]
    titles += [f"{title} − {BASELINE}" for title in _TITLES.values()]
    rows = []
    for variant in shown:
        cells = [variant.name, str(len(results.numbers(variant)))]
        cells += [str(bootstrap(results.values(variant, score))) for score in _TITLES]
        less = [_difference(variant, score, results, baseline) for score in _TITLES]
        rows.append(cells + ["—" if found is None else found.signed() for found in less])
    return (
        f"# {study.title}\n\n"
        f"{protocol.prompts} prompts × {protocol.seeds} seeds per identity, "
        f"{protocol.sampling_steps} sampling steps, guidance {protocol.guidance:g}, "
        f"{protocol.precision}. Brackets: 95 % bootstrap interval over identities. Bold: the "
        f"paired difference excludes zero. All scores: {study.name}.csv.\n\n"
        + markdown_table(titles, rows)
    )


def _sheet(
    folder: Path, study: Study, shown: Sequence[Variant], results: Results
) -> Image.Image | None:
    """Show the first identities: a row per variant, with the first image of some prompts."""
    shared = sorted(set.intersection(*(set(results.numbers(variant)) for variant in shown)))
    rows: list[tuple[str, list[Panel]]] = []
    for number in shared[:_SHEET_IDENTITIES]:
        one = results.protocol.subjects(number + 1)[-1]
        rows.append((f"identity {number}: its one image", [Panel(draw(one.image)[0])]))
        for variant in shown:
            path = Task(folder, variant, (number,), results.protocol).strip(number)
            if path.exists():
                texts = [prompt.text for prompt in one.prompts[:_SHEET_PROMPTS]]
                # The font of the sheets has no Greek letters.
                name = variant.name.replace("λ", "lambda")
                rows.append((name, list(map(Panel, images_of(path), texts))))
    title = f"{study.title}: first seed, nothing picked"
    return contact_sheet(rows, title=title, panel_size=96) if rows else None


def judge_sheet(results: Results) -> Image.Image | None:
    """Show random images of all variants over the judge's verdict; None if there are none.

    A reader can compare the judge with their own eyes. Its accuracy on drawings is in
    docs/tiny-world.md.
    """
    folder = results.folder / "images"
    name = f"{results.protocol.model}-s{results.protocol.seed}-*.png"
    strips = [path for key in sorted(results.found) for path in sorted((folder / key).glob(name))]
    places = [(path, k) for path in strips for k in range(results.protocol.prompts)]
    random.Random(0).shuffle(places)
    images = [images_of(path)[k] for path, k in places[:_JUDGED_IMAGES]]
    if not images:
        return None
    panels = list(map(Panel, images, map(verdict, Judge.load()(images))))
    starts = range(0, len(panels), _JUDGE_COLUMNS)
    rows = [("", panels[start : start + _JUDGE_COLUMNS]) for start in starts]
    title = f"the judge's verdict on {len(panels)} random images of the study"
    return contact_sheet(rows, title=title, panel_size=120)


def verdict(judgement: Judgement) -> str:
    """Return all of the judge's answers in a line."""
    labels = judgement.labels
    if labels["creature"] == "no":
        return f"no creature, {labels['scene']}"
    second = "" if labels["second_colour"] == "none" else f"/{labels['second_colour']}"
    parts = [f"{labels['colour']}{second} {labels['pattern']}", f"{labels['ears']} ears"]
    parts += [labels["shape"], *(name for name in ACCESSORIES if labels[name] == "yes")]
    return ", ".join([*parts, labels["scene"], labels["position"]])
