"""Tables, plots and sheets of a study."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from evals.studies.plots import plot_study
from evals.studies.results import Results
from evals.studies.tasks import Task
from evals.studies.variants import BASELINE, CONTROLS, Study, Variant
from sefi_fast.evaluation.sheets import Panel, contact_sheet, png
from sefi_fast.evaluation.statistics import Interval, bootstrap, paired_difference
from sefi_fast.tiny_world.drawing import ACCESSORIES
from sefi_fast.tiny_world.judge import Judge, Judgement
from sefi_fast.training.image import load_image
from sefi_fast.utils.files import atomic_write

_COLUMNS = 8


def judge_sheet(results: Results, count: int = 48, seed: int = 0) -> Image.Image | None:
    """Draw random images of all variants, each over the judge's verdict; None if there are none.

    Whether the judge reads generated images as a person would is to be seen here; its accuracy on
    drawings is in docs/tiny-world.md.

    Args:
        results: of the study.
        count: most images.
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
    title = f"what the judge says of {len(panels)} random images of the study"
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


SCORED = ("id", "rank", "prompt", "share", "id_p", "leak", "open_leak", "open_id")
COMPARED = ("id", "prompt", "id_p", "open_leak")
MEASURED = ("inside", "class_inside", "correlation", "taken", "final_loss", "final_subject_loss",
            "seconds")  # fmt: skip
TITLES = {
    "id": "ID",
    "rank": "ID rank",
    "prompt": "Prompt",
    "share": "attributes",
    "id_p": "ID(P)",
    "leak": "leak",
    "open_leak": "open leak",
    "open_id": "open ID",
    "inside": "map inside",
    "class_inside": "class word's",
    "correlation": "others' maps",
    "taken": "taken",
    "final_loss": "loss",
    "final_subject_loss": "subject_loss",
    "seconds": "seconds",
}
_SHEET_IDENTITIES = 3
_SHEET_PROMPTS = 6


def write_report(
    folder: Path, studies: Sequence[Study], results: Results, baseline: Variant
) -> list[Path]:
    """Write what is known so far: a table, a CSV, a plot and a sheet for each study; JSON of all.

    Args:
        folder: where to.
        studies: what is compared.
        results: the scores.
        baseline: what the others' differences are taken to.

    Returns:
        The files.

    Raises:
        OSError: a file cannot be written.
    """
    files: list[Path] = []
    summary: dict[str, Any] = {}
    for study in studies:
        shown = [v for v in (*_controls(), *study.variants) if results.numbers(v)]
        if not shown:
            continue
        rows = [_row(variant, results, baseline) for variant in shown]
        summary[study.name] = [_plain(row) for row in rows]
        texts = {"md": _markdown(study, rows, results, shown), "csv": _csv(rows)}
        for suffix, text in texts.items():
            files.append(folder / f"{study.name}.{suffix}")
            atomic_write(files[-1], text.encode())
        pictures = {
            folder / f"{study.name}.png": plot_study(study, results),
            folder / f"{study.name}-sheet.png": _sheet(folder, study, results),
        }
        for path, picture in pictures.items():
            if picture is not None:
                atomic_write(path, png(picture))
                files.append(path)
    verdicts = judge_sheet(results)
    if verdicts is not None:
        files.append(folder / "judge-sheet.png")
        atomic_write(files[-1], png(verdicts))
    files.append(folder / "summary.json")
    text = json.dumps(
        {"protocol": asdict(results.protocol), "studies": summary}, indent=1, ensure_ascii=False
    )
    atomic_write(files[-1], text.encode())
    return files


def _controls() -> list[Variant]:
    return [Variant(name, None) for name in CONTROLS]


def _row(variant: Variant, results: Results, baseline: Variant) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": variant.name, "key": variant.key}
    for score in (*SCORED, *MEASURED):
        values = results.values(variant, score)
        row[score] = bootstrap(values) if values else None
        if score not in SCORED or variant.key == baseline.key:
            continue
        before = results.values(baseline, score)
        if values.keys() & before.keys():
            row[f"{score} − {BASELINE}"] = paired_difference(values, before)
    return row


def _markdown(
    study: Study, rows: Sequence[dict[str, Any]], results: Results, shown: Sequence[Variant]
) -> str:
    protocol = results.protocol
    head = [
        f"# {study.title}",
        "",
        f"{protocol.prompts} prompts × {protocol.seeds} seeds for each identity, "
        f"{protocol.sampling_steps} sampling steps, guidance {protocol.guidance:g}. In brackets: "
        "95 % bootstrap interval over identities. Leak: share of images that show the training "
        "image's scene though another was asked for; open leak: though none was asked for.",
        "",
    ]
    table = _table(
        ["variant", "identities", *(TITLES[s] for s in SCORED)],
        [
            [r["variant"], str(r["id"].identities), *(str(r[s] or "—") for s in SCORED)]
            for r in rows
        ],
    )
    paired = _table(
        ["variant", *(f"{TITLES[s]} − {BASELINE}" for s in COMPARED)],
        [[r["variant"], *(_signed(r.get(f"{s} − {BASELINE}")) for s in COMPARED)] for r in rows],
    )
    attention = _table(
        ["variant", *(TITLES[s] for s in MEASURED)],
        [[r["variant"], *(_brief(r[s]) for s in MEASURED)] for r in rows],
    )
    kinds = results.kinds()
    by_kind = _table(
        ["variant", *kinds],
        [[v.name, *(_by_kind(results, v, kind) for kind in kinds)] for v in shown],
    )
    parts = [
        *head, *table, "",
        f"Paired differences to {BASELINE}, identity by identity; bold: the interval excludes 0.",
        "", *paired, "",
        "Attention and training (means):", "", *attention, "",
        "ID / Prompt by kind of prompt:", "", *by_kind, "",
    ]  # fmt: skip
    return "\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _by_kind(results: Results, variant: Variant, kind: str) -> str:
    both = []
    for score in ("id", "prompt"):
        values = results.values(variant, score, [kind])
        both.append(f"{sum(values.values()) / len(values):.2f}" if values else "—")
    return " / ".join(both)


def _signed(value: Interval | None) -> str:
    return "—" if value is None else value.signed()


def _brief(value: Interval | None) -> str:
    return "—" if value is None else f"{value.mean:.3g}"


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Interval) else value
        for name, value in row.items()
    }


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        columns += [name] if name in ("variant", "key") else [name, f"{name} low", f"{name} high"]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*columns, "identities"])
    for row in rows:
        cells: list[Any] = []
        for name in names:
            value = row.get(name)
            if name in ("variant", "key"):
                cells.append(value)
            elif value is None:
                cells += ["", "", ""]
            else:
                cells += [f"{number:.5g}" for number in value[:3]]
        writer.writerow([*cells, row["id"].identities])
    return stream.getvalue()


def _sheet(folder: Path, study: Study, results: Results) -> Image.Image | None:
    """The first identities, the variants below one another, the first image of some prompts."""
    from sefi_fast.tiny_world.drawing import draw

    shown = [v for v in (*_controls(), *study.variants) if results.numbers(v)]
    shared = sorted(set.intersection(*(set(results.numbers(v)) for v in shown)))
    if not shared:
        return None
    rows: list[tuple[str, list[Panel]]] = []
    for one in results.protocol.subjects(max(shared) + 1):
        if one.number not in shared[:_SHEET_IDENTITIES]:
            continue
        rows.append((f"identity {one.number}: its one image", [Panel(draw(one.picture)[0])]))
        for variant in shown:
            path = Task(folder, variant, (one.number,), results.protocol).pictures(one.number)
            if not path.exists():
                continue
            strip = load_image(path)
            side = strip.height
            panels = [
                Panel(strip.crop((side * k, 0, side * (k + 1), side)), prompt.text)
                for k, prompt in enumerate(one.prompts[:_SHEET_PROMPTS])
            ]
            # The font of the sheets has no Greek letters.
            rows.append((variant.name.replace("λ", "lambda"), panels))
    return contact_sheet(rows, title=f"{study.title}: first seed, nothing picked", panel_size=96)
