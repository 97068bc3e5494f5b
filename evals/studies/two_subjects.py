"""Compare ways to generate two subjects in one image."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm.auto import tqdm

from evals.studies.prompts import StudySubject, identity_words
from evals.studies.tasks import IMAGE_SIZE as PANEL_SIZE
from evals.studies.tasks import Protocol, Task, train
from evals.studies.variants import BASELINE, Variant
from evals.tiny_world.pairs import HALVES, halves_of
from sefi_fast.errors import ModelError, TrainingError
from sefi_fast.evaluation.sheets import Panel, contact_sheet, png
from sefi_fast.evaluation.statistics import bootstrap, paired_difference
from sefi_fast.evaluation.tables import csv_bytes, markdown_table, write_files
from sefi_fast.pipelines import attach, load_pipeline, regions
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD, two_creatures_lora
from sefi_fast.tiny_world.captions import SCENE_PHRASES
from sefi_fast.tiny_world.drawing import IMAGE_SIZE, SCENES, Identity, draw
from sefi_fast.tiny_world.judge import IDENTITY_ATTRIBUTES, Judge, Judgement
from sefi_fast.training import TrainConfig
from sefi_fast.utils.files import check_folder


def pair_pipeline(dtype: torch.dtype) -> Any:
    """Return the bundled model with its LoRA for two creatures, merged in float32.

    Raises:
        ModelError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ModelError("The LoRA for two creatures needs peft. Run pip install peft.")
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
    """Generate images of two creatures, 96×48 pixels, one per seed.

    Args:
        pipe: pipeline of `pair_pipeline`; subjects may be attached.
        words: names of the left and the right creature, such as "a <a>".
        scene: one of drawing.SCENES.
        seeds: seeds of the noise.
        by_halves: whether each half has a sentence (`regions`) instead of one for both.
        steps: denoising steps.
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


_SCENES_PER_PAIR = 2
_SHEET_PAIRS = 4
# A batch of several trains faster per subject than one by one.
_BATCH_SUBJECTS = 4


class TwoScore(NamedTuple):
    """Scores of one image of two subjects.

    Attributes:
        both: 1 if each half shows a creature.
        id: mean over the halves of the likeness to its own subject.
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
    """A way to ask for two creatures: a name for each, in one sentence or one for each half."""

    name: str
    words: Callable[[StudySubject, int], str]
    by_halves: bool


_COMPARED_TO = "subjects, one sentence"
_WAYS = (
    _Way("class words, one sentence", lambda one, place: f"a {CLASS_WORD}", False),
    _Way(_COMPARED_TO, lambda one, place: ("a <a>", "a <b>")[place], False),
    _Way("subjects, a region each", lambda one, place: ("a <a>", "a <b>")[place], True),
    _Way("spelled out, one sentence", lambda one, _: f"a {identity_words(one.identity)}", False),
    _Way("spelled out, a region each", lambda one, _: f"a {identity_words(one.identity)}", True),
)
Scores = dict[str, dict[int, list[TwoScore]]]
"""Name of a way → number of a pair → scores of its images."""


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
    """Generate pairs of trained subjects in double-wide images, and judge how far they mix.

    The subjects are trained on the bundled model, and generated with its LoRA for two creatures
    (`sefi_fast.tiny_world.two_creatures_lora`), which never saw them. Subject i is next to subject
    i + 1, and the last next to the first. Each is in two pairs, so the intervals, which resample
    pairs, are a little too narrow. Subjects that an earlier study in the folder trained by the same
    settings are not trained again. In one sentence the model chooses the order of the two, so there
    the better of both assignments counts.

    Args:
        output: folder of `two.csv`, `two.md` and `two-sheet.png`.
        identities: number of subjects, and of pairs; 2 to 66.
        seeds: images of each pair, scene and way to ask.
        seed, config, progress, **overrides: as for `run_study`.

    Returns:
        The files.

    Raises:
        ValueError, TypeError: a number or a setting is out of range.
        ModelError: peft is not installed.
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
    trained = _train(Task(folder, Variant(BASELINE, settings), (), protocol), chosen, progress)
    judge = Judge.load()
    scores: Scores = {way.name: {} for way in _WAYS}
    rows: list[tuple[str, list[Panel]]] = []
    for place in tqdm(range(identities), unit="pair", disable=not progress):
        pair = chosen[place], chosen[(place + 1) % identities]
        names = zip((trained[one.number] for one in pair), ("<a>", "<b>"), strict=True)
        attach(pipe, [replace(subject, placeholder=name) for subject, name in names])
        panels = [Panel(draw(one.image, IMAGE_SIZE)[0], "trained on") for one in pair]
        for way in _WAYS:
            images = _generate(pipe, way, pair, protocol)
            halves = [judge([halves_of(image)[k] for image in images]) for k in (0, 1)]
            identity = pair[0].identity, pair[1].identity
            scores[way.name][place] = [
                score_halves(both, identity, ordered=way.by_halves)
                for both in zip(*halves, strict=True)
            ]
            panels.append(Panel(images[0], way.name))
        if place < _SHEET_PAIRS:
            rows.append(("", panels))
    about = (
        f"{identities} pairs of {identities} trained subjects, {_SCENES_PER_PAIR} scenes, {seeds} "
        f"images each of {2 * IMAGE_SIZE}×{IMAGE_SIZE} pixels, {settings.steps} training and "
        f"{protocol.sampling_steps} sampling steps, {protocol.precision}. "
        "95 % intervals over pairs."
    )
    sheet = contact_sheet(rows, title="two subjects in one image", panel_size=PANEL_SIZE)
    contents = {
        "two.csv": csv_bytes(_rows(scores)),
        "two.md": f"{about}\n\n{_table(scores)}".encode(),
        "two-sheet.png": png(sheet),
    }
    return write_files(folder, contents)


def score_halves(
    halves: tuple[Judgement, Judgement], pair: tuple[Identity, Identity], *, ordered: bool
) -> TwoScore:
    """Score an image by the judge's answers for its left and its right half.

    Args:
        halves: left and right half.
        pair: the two subjects.
        ordered: whether the prompt puts the first on the left. If not, the assignment with the
            higher likeness counts.
    """
    orders = [(0, 1)] if ordered else [(0, 1), (1, 0)]
    likeness = {
        order: sum(half.shows(pair[who]) for half, who in zip(halves, order, strict=True)) / 2
        for order in orders
    }
    order = max(likeness, key=likeness.__getitem__)
    first, second = pair
    differing = [name for name in IDENTITY_ATTRIBUTES if first.value(name) != second.value(name)]
    creatures = own = other = 0
    for half, who in zip(halves, order, strict=True):
        labels = half.labels
        if labels["creature"] == "yes":
            creatures += 1
            own += sum(labels[name] == pair[who].value(name) for name in differing)
            other += sum(labels[name] == pair[1 - who].value(name) for name in differing)
    asked = 2 * len(differing)
    return TwoScore(float(creatures == 2), likeness[order], own / asked, other / asked)


def _train(task: Task, chosen: Sequence[StudySubject], progress: bool) -> dict[int, Subject]:
    """Return identity → its subject, from the folder if it is there."""
    with tqdm(total=len(chosen), unit="subject", disable=not progress) as bar:
        for start in range(0, len(chosen), _BATCH_SUBJECTS):
            group = chosen[start : start + _BATCH_SUBJECTS]
            for result in train(task, group):
                if result.error is not None:
                    raise TrainingError(f"{result.name} could not be trained: {result.error}")
            bar.update(len(group))
    return {one.number: Subject.load(task.subject(one.number)) for one in chosen}


def _generate(
    pipe: Any, way: _Way, pair: tuple[StudySubject, StudySubject], protocol: Protocol
) -> list[Image.Image]:
    """Return all seeds of the first scene, then of the next; the same noise for every way."""
    taken = {one.image.scene for one in pair}
    scenes = [scene for scene in SCENES if scene not in taken]
    random.Random(pair[0].number).shuffle(scenes)
    images: list[Image.Image] = []
    for scene in scenes[:_SCENES_PER_PAIR]:
        images += generate_pair(
            pipe,
            (way.words(pair[0], 0), way.words(pair[1], 1)),
            scene,
            range(protocol.seeds),
            by_halves=way.by_halves,
            steps=protocol.sampling_steps,
            guidance=protocol.guidance,
        )
    return images


def _rows(scores: Scores) -> Iterator[dict[str, object]]:
    for way, pairs in scores.items():
        for pair, found in pairs.items():
            for number, score in enumerate(found):
                rounded = {name: round(value, 4) for name, value in score._asdict().items()}
                yield {"way": way, "pair": pair, "image": number, **rounded}


def _table(scores: Scores) -> str:
    """Tabulate the means over pairs with intervals."""

    def means(way: str, place: int) -> dict[int, float]:
        return {
            pair: sum(score[place] for score in found) / len(found)
            for pair, found in scores[way].items()
        }

    titles = ("asked for by", "two creatures", "ID", "own attributes", "confused")
    rows = []
    for way in scores:
        cells = [str(bootstrap(means(way, place))) for place in range(len(TwoScore._fields))]
        less = paired_difference(means(way, 3), means(_COMPARED_TO, 3))
        rows.append([way, *cells, "—" if way == _COMPARED_TO else less.signed()])
    return markdown_table([*titles, "confused − one sentence"], rows)
