"""Compare ways to generate two subjects in one image."""

from __future__ import annotations

import csv
import io
import os
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from evals.studies.prompts import StudySubject, identity_words
from evals.studies.tasks import IMAGE_SIZE as PANEL_SIZE
from evals.studies.tasks import Protocol, Task, train
from evals.studies.variants import BASELINE, Variant
from sefi_fast.errors import ModelError
from sefi_fast.evaluation.sheets import Panel, contact_sheet, png
from sefi_fast.evaluation.statistics import bootstrap, paired_difference
from sefi_fast.pipelines import attach, detach, load_pipeline, regions
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD, two_creatures_lora
from sefi_fast.tiny_world.captions import SCENE_PHRASES
from sefi_fast.tiny_world.drawing import IMAGE_SIZE, SCENES, Identity, draw
from sefi_fast.tiny_world.judge import IDENTITY_ATTRIBUTES, Judge, Judgement
from sefi_fast.tiny_world.pairs import HALVES, halves_of
from sefi_fast.training import TrainConfig
from sefi_fast.utils.files import atomic_write, check_folder


def pair_pipeline(dtype: torch.dtype) -> Any:
    """The bundled model with its LoRA for two creatures, merged in float32; without a bar.

    Raises:
        ModelError: peft, through which diffusers loads a LoRA, is not installed.
    """
    if find_spec("peft") is None:
        raise ModelError(
            "two creatures in an image take a LoRA, which diffusers loads through peft: "
            "pip install peft"
        )
    unet = load_pipeline(None, dtype=torch.float32).unet
    unet.load_lora_adapter(two_creatures_lora(), prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    pipe = load_pipeline(None, dtype=dtype)
    pipe.unet.load_state_dict(unet.state_dict())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.inference_mode()
def generate_pair(
    pipe: Any,
    words: tuple[str, str],
    scene: str,
    seeds: Iterable[int],
    *,
    by_halves: bool,
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    """Draw two creatures, one image a seed, 96×48 pixels.

    Args:
        pipe: of `pair_pipeline`; subjects may be attached.
        words: what stands for the left and the right creature, such as "a <a>".
        scene: of drawing.SCENES.
        seeds: of the noise.
        by_halves: a sentence for each half (`regions`) instead of one for both.
        steps: of the sampler.
        guidance: guidance scale.
    """
    where = SCENE_PHRASES[scene]
    sentences = [f"a photo of {one} {where}" for one in words]
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    halves = regions(pipe, list(zip(sentences, HALVES, strict=True)))
    with halves if by_halves else nullcontext():
        images: list[Image.Image] = pipe(
            [f"a photo of {words[0]} and {words[1]} {where}"] * len(noise),
            width=2 * IMAGE_SIZE,
            height=IMAGE_SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noise,
        ).images
    return images


_SCENES_A_PAIR = 2
_SHEET_PAIRS = 4
# Training several in one batch is half as fast again as one by one.
_SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class TwoScore:
    """What the judge says of the halves of one image.

    Attributes:
        both: 1 if each half shows a creature.
        id: mean over the halves of the likeness to its own subject (`scores.ImageScore.id`).
        own: share of the attributes in which the two subjects differ that each half shows as its
            own subject has them; an empty half shows none.
        confused: share of those that it shows as the *other* subject has them.
    """

    both: float
    id: float
    own: float
    confused: float


@dataclass(frozen=True)
class _Way:
    """How two creatures are asked for: what stands for each, and whether each half has a prompt."""

    name: str
    words: Callable[[StudySubject, int], str]
    by_halves: bool


_WAYS = (
    _Way("class words, one sentence", lambda one, place: f"a {CLASS_WORD}", False),
    _Way("subjects, one sentence", lambda one, place: ("a <a>", "a <b>")[place], False),
    _Way("subjects, a region each", lambda one, place: ("a <a>", "a <b>")[place], True),
    _Way("spelled out, one sentence", lambda one, _: f"a {identity_words(one.identity)}", False),
    _Way("spelled out, a region each", lambda one, _: f"a {identity_words(one.identity)}", True),
)
_COMPARED_TO = "subjects, one sentence"


def compare_two_subjects(
    *,
    output: str | os.PathLike[str] = "evidence",
    identities: int = 12,
    seeds: int = 4,
    seed: int = 0,
    config: TrainConfig | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[Path]:
    """Draw pairs of learnt subjects in double-wide images, and judge how far they mix.

    The subjects are learnt from the bundled model as it is; for the images it has its LoRA for
    two creatures (`sefi_fast.tiny_world.two_creatures_lora`), which never saw the subjects.
    Subject i stands beside subject i + 1, the last one beside the first. Each is in two pairs, and
    the intervals, which resample pairs, are a little too narrow for that. What an earlier study in
    the folder has learnt by the same settings is not learnt again. In one sentence the model is
    free in who stands where, so there the better of both assignments counts.

    Args:
        output: folder; `two.md`, `two.csv` and `two-sheet.png` come there.
        identities: subjects, and pairs of them; 2 to 66.
        seeds: images of each pair, scene and way of asking.
        seed, config, progress, **overrides: as for `run_study`.

    Returns:
        The files.

    Raises:
        ValueError, TypeError: a number or a setting is out of range.
        ModelError: peft, through which diffusers loads a LoRA, is not installed.
        OSError: the folder cannot be written.
    """
    for name, value, least in (("identities", identities, 2), ("seeds", seeds, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    settings = TrainConfig.from_overrides(config, overrides)
    folder = check_folder(output, make=False)
    protocol = Protocol.of(settings, prompts=1, seeds=seeds, seed=seed)
    chosen = protocol.subjects(identities)
    pipe = pair_pipeline(protocol.dtype)
    learnt = _learn(folder, settings, chosen, protocol, progress)
    judge = Judge.load()
    scores: dict[str, dict[int, list[TwoScore]]] = {way.name: {} for way in _WAYS}
    rows: list[tuple[str, list[Panel]]] = []
    for place in tqdm(range(identities), unit="pair", disable=not progress):
        pair = chosen[place], chosen[(place + 1) % identities]
        names = zip((learnt[one.number] for one in pair), ("<a>", "<b>"), strict=True)
        attach(pipe, [replace(subject, placeholder=name) for subject, name in names])
        panels = [Panel(draw(one.picture, IMAGE_SIZE)[0], "learnt from") for one in pair]
        for way in _WAYS:
            pictures = _draw_pair(pipe, way, pair, protocol)
            scores[way.name][place] = _judge(judge, pictures, pair, way.by_halves)
            panels.append(Panel(pictures[0], way.name))
        if place < _SHEET_PAIRS:
            rows.append(("", panels))
        detach(pipe)
    about = (
        f"{identities} pairs of {identities} learnt subjects, {_SCENES_A_PAIR} scenes, {seeds} "
        f"images each of {2 * IMAGE_SIZE}×{IMAGE_SIZE} pixels, {settings.steps} training and "
        f"{protocol.sampling_steps} sampling steps, {protocol.precision}. "
        "95 % intervals over pairs."
    )
    return _report(folder, about, scores, rows)


def score_halves(
    halves: tuple[Judgement, Judgement], pair: tuple[Identity, Identity], *, ordered: bool
) -> TwoScore:
    """Score an image by what the judge says of its left and its right half.

    Args:
        halves: left and right.
        pair: who was asked for.
        ordered: whether the first was asked for on the left; else the better of both assignments
            by likeness counts.
    """
    orders = [(0, 1)] if ordered else [(0, 1), (1, 0)]
    likeness = {
        order: sum(half.shows(pair[who]) for half, who in zip(halves, order, strict=True)) / 2
        for order in orders
    }
    order = max(likeness, key=likeness.__getitem__)
    first, second = pair
    differing = [name for name in IDENTITY_ATTRIBUTES if first.value(name) != second.value(name)]
    own = other = 0
    for half, who in zip(halves, order, strict=True):
        labels = half.labels
        if labels["creature"] != "yes":
            continue
        own += sum(labels[name] == pair[who].value(name) for name in differing)
        other += sum(labels[name] == pair[1 - who].value(name) for name in differing)
    asked = 2 * len(differing)
    both = all(half.labels["creature"] == "yes" for half in halves)
    return TwoScore(float(both), likeness[order], own / asked, other / asked)


def _learn(
    folder: Path,
    settings: TrainConfig,
    chosen: Sequence[StudySubject],
    protocol: Protocol,
    progress: bool,
) -> dict[int, Subject]:
    """Identity → its subject, from the folder where it lies there."""
    task = Task(folder, Variant(BASELINE, settings), tuple(one.number for one in chosen), protocol)
    with tqdm(total=len(chosen), unit="subject", disable=not progress) as bar:
        for start in range(0, len(chosen), _SIDE_BY_SIDE):
            group = chosen[start : start + _SIDE_BY_SIDE]
            for result in train(task, group):
                if result.error is not None:
                    raise ValueError(f"{result.name} could not be learnt: {result.error}")
            bar.update(len(group))
    return {number: Subject.load(task.subject(number)) for number in task.numbers}


def _draw_pair(
    pipe: Any, way: _Way, pair: tuple[StudySubject, StudySubject], protocol: Protocol
) -> list[Image.Image]:
    """All seeds of the first scene, then of the next; equal noise for every way."""
    taken = {one.picture.scene for one in pair}
    scenes = [scene for scene in SCENES if scene not in taken]
    random.Random(pair[0].number).shuffle(scenes)
    pictures: list[Image.Image] = []
    for scene in scenes[:_SCENES_A_PAIR]:
        pictures += generate_pair(
            pipe,
            (way.words(pair[0], 0), way.words(pair[1], 1)),
            scene,
            range(protocol.seeds),
            by_halves=way.by_halves,
            steps=protocol.sampling_steps,
            guidance=protocol.guidance,
        )
    return pictures


def _judge(
    judge: Judge,
    pictures: Sequence[Image.Image],
    pair: tuple[StudySubject, StudySubject],
    ordered: bool,
) -> list[TwoScore]:
    left, right = (judge([halves_of(picture)[place] for picture in pictures]) for place in (0, 1))
    identities = pair[0].identity, pair[1].identity
    return [
        score_halves(halves, identities, ordered=ordered)
        for halves in zip(left, right, strict=True)
    ]


def _report(
    folder: Path,
    about: str,
    scores: dict[str, dict[int, list[TwoScore]]],
    rows: Sequence[tuple[str, Sequence[Panel]]],
) -> list[Path]:
    columns = {"both": "two creatures", "id": "ID", "own": "own attributes", "confused": "confused"}
    means = {
        way: {
            column: {
                pair: sum(getattr(score, column) for score in found) / len(found)
                for pair, found in pairs.items()
            }
            for column in columns
        }
        for way, pairs in scores.items()
    }
    titles = [*columns.values(), "confused less one sentence's"]
    lines = [
        about,
        "",
        "| asked for by | " + " | ".join(titles) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for way, by_column in means.items():
        cells = [str(bootstrap(by_column[column])) for column in columns]
        less = paired_difference(by_column["confused"], means[_COMPARED_TO]["confused"])
        cells.append("—" if way == _COMPARED_TO else less.signed())
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["way", "pair", "picture", *columns])
    for way, pairs in scores.items():
        for pair, found in pairs.items():
            for number, score in enumerate(found):
                values = [round(value, 4) for value in asdict(score).values()]
                writer.writerow([way, pair, number, *values])
    sheet = contact_sheet(rows, title="two subjects in one image", panel_size=PANEL_SIZE)
    files = {
        "two.md": ("\n".join(lines) + "\n").encode(),
        "two.csv": table.getvalue().encode(),
        "two-sheet.png": png(sheet),
    }
    for name, content in files.items():
        atomic_write(folder / name, content)
    return [folder / name for name in files]
