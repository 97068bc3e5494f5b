"""Score trained subjects: `sefi_fast.evaluation.evaluate`."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from sefi_fast.evaluation.prompts import Prompts, filled, prompts_for, read_prompts
from sefi_fast.evaluation.scorers import ClipScorer, DinoScorer, FaceScorer, TinyScorer, asked_by
from sefi_fast.evaluation.sheets import Panel, contact_sheet, png
from sefi_fast.evaluation.statistics import bootstrap
from sefi_fast.pipelines import attach, detach, generate, load_pipeline
from sefi_fast.pipelines.encode_prompt import EncodePromptPatch
from sefi_fast.pipelines.loading import kept_model
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD, SAMPLING
from sefi_fast.training.image import load_image
from sefi_fast.utils.files import atomic_write, user_path
from sefi_fast.utils.outputs import check_folder

if TYPE_CHECKING:
    import numpy as np

    Picture = str | os.PathLike[str] | Image.Image | np.ndarray


CONTROL = "class word"
"""Name of the rows whose images have the class word in the subject's place."""
_TEXT_COLUMNS = ("subject", "kind", "prompt", "seed")
_PANELS_A_ROW = 8


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        rows: one an image: subject, kind, prompt, seed, and each score by name. "prompt score" and
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
        """Mean over a subject's images, of one kind or all; None if it has none."""
        values = [
            row[score]
            for row in self.rows
            if row["subject"] == subject and kind in (None, row["kind"]) and score in row
        ]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Drawn:
    """The images of one prompt with some subjects, or with their class words.

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
    """Write scores (CSV), the means (Markdown) and a sheet with the first image of each prompt.

    Args:
        folder: where to.
        found: the scores.
        shown: an image of each job.
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
    lines = [f"| images of | {' | '.join(scores)} |", "|" + "---|" * (len(scores) + 1)]

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


class Scorers:
    """Scores images by the models given; the arguments are those of `evaluate`.

    Args:
        clip, dino, face: models, or None for no such score.
        bundled: whether the bundled model's judge scores too.
        references: the image that each subject was learnt from.
    """

    def __init__(
        self,
        clip: Any,
        dino: Any,
        face: Any,
        bundled: bool,
        references: Sequence[Image.Image] | None,
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._clip = ClipScorer(clip, device) if clip else None
        self._dino = DinoScorer(dino, device) if dino else None
        self._face = FaceScorer(face) if face else None
        self._tiny = TinyScorer() if bundled else None
        self._references = references

    def check(self, prompts: Iterable[str]) -> None:
        """Raise PromptError if what a prompt, {} for the subject, asks for cannot be scored."""
        for prompt in prompts if self._tiny is not None else ():
            asked_by(_to_the_judge(prompt))

    def __call__(
        self, images: Sequence[Image.Image], job: Drawn, subjects: Sequence[Subject]
    ) -> list[dict[str, float]]:
        """Scores of each image; with two subjects the mean of their image scores."""
        columns: dict[str, list[float]] = {}
        text = filled(job.prompt, [subjects[place].class_word for place in job.subjects])
        if self._clip is not None:
            columns["clip text"] = self._clip.text(images, [text] * len(images))
        if self._references is not None:
            scorers = (("clip image", self._clip), ("dino image", self._dino), ("face", self._face))
            for name, scorer in scorers:
                if scorer is not None:
                    each = [scorer.image(images, self._references[p]) for p in job.subjects]
                    columns[name] = [
                        sum(values) / len(values) for values in zip(*each, strict=True)
                    ]
        if self._tiny is not None:
            columns |= self._judged(images, job)
        else:
            columns |= _id_p(columns)
        return [
            {name: round(values[place], 5) for name, values in columns.items()}
            for place in range(len(images))
        ]

    def _judged(self, images: Sequence[Image.Image], job: Drawn) -> dict[str, list[float]]:
        assert self._tiny is not None
        # The judge knows one creature an image.
        reference = self._references[job.subjects[0]] if self._references else None
        texts = [_to_the_judge(job.prompt)] * len(images)
        found = self._tiny(images, texts, reference or images[0])
        columns = {
            "prompt score": [score.prompt for score in found],
            "attributes": [score.share for score in found],
        }
        if reference is not None and len(job.subjects) == 1:
            columns["id"] = [score.id for score in found]
            columns["id rank"] = [score.rank for score in found]
            columns["id(p)"] = [score.id_p for score in found]
            columns["leak"] = [score.leak for score in found]
        return columns


def _to_the_judge(prompt: str) -> str:
    """The prompt as the judge reads it: whatever stands for the subject is a creature to it."""
    return filled(prompt, [CLASS_WORD] * prompt.count("{}"))


def _id_p(columns: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """ID · Prompt of the best identity score there is; neither counts below zero."""
    identity = next((n for n in ("face", "dino image", "clip image") if n in columns), None)
    if identity is None or "clip text" not in columns:
        return {}
    both = zip(columns[identity], columns["clip text"], strict=True)
    return {"id(p)": [max(0.0, one) * max(0.0, text) for one, text in both]}


def evaluate(
    subjects: Subject | str | os.PathLike[str] | Sequence[Subject | str | os.PathLike[str]],
    *,
    model: Any = None,
    model_config: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    prompts: Prompts | Sequence[str] | str | os.PathLike[str] | None = None,
    references: Sequence[Picture] | None = None,
    seeds: int = 4,
    steps: int | None = None,
    guidance: float | None = None,
    clip: str | os.PathLike[str] | None = None,
    dino: str | os.PathLike[str] | None = None,
    face: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = "evaluation",
    progress: bool = True,
) -> Evaluation:
    """Draw prompts with finished subjects, and with their class words, and score the images.

    Images that the folder already holds are not drawn again, so a run that was ended goes on with
    the same call. On the bundled model the judge scores without any further model. The models of
    the scores are the user's: a hub id is downloaded by transformers, a folder is not.

    Args:
        subjects: one or several, or their files.
        model: as for `load_pipeline`, or a pipeline; default: what the first was trained on.
        model_config, vae: as `config` and `vae` for `load_pipeline`; default with the first
            subject's model: what that was trained with.
        prompts: class → sentences, sentences, or a file of them (`prompt_classes.read_prompts`);
            {} where the subject stands, twice for two subjects, which are then taken in turn.
            Default: scenes, actions, attributes and several subjects that suit the class word.
        references: the image that each subject was learnt from, for the image scores.
        seeds: images of each prompt.
        steps, guidance: of the sampler; default: what suits the model.
        clip: a CLIP model for text and image scores.
        dino: a DINO or DINOv2 model for image scores.
        face: an insightface model pack for face scores.
        output: folder for images, scores (CSV), table (Markdown) and sheet.
        progress: show a progress bar.

    Raises:
        ValueError: there is nothing to draw or to score with, or the references are of another
            number than the subjects.
        PromptError: of the bundled model a prompt asks for what its judge does not tell; or as for
            generating.
        SubjectFileError, ModelError, ImageError: as for attaching and generating.
    """
    given = [subjects] if isinstance(subjects, (Subject, str, os.PathLike)) else list(subjects)
    if not given:
        raise ValueError("evaluate got no subject: give at least one")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    loaded = [one if isinstance(one, Subject) else Subject.load(os.fspath(one)) for one in given]
    names = _names(given)
    pictures = None if references is None else [load_image(one) for one in references]
    if pictures is not None and len(pictures) != len(loaded):
        raise ValueError(
            f"there are {len(pictures)} reference images for {len(loaded)} subjects: give one "
            "for each, in the same order"
        )
    wanted_model = {"model": model, "config": model_config, "vae": vae}
    if model is None:
        kept = kept_model(loaded[0])
        wanted_model = {n: kept[n] if given is None else given for n, given in wanted_model.items()}
    model = wanted_model["model"]
    bundled = model is None
    ready = not (bundled or isinstance(model, (str, os.PathLike)))
    if ready and (model_config is not None or vae is not None):
        raise ValueError(
            "model_config and vae are for a model that is loaded, and a ready pipeline was given: "
            "leave them out, and set pipe.vae instead"
        )
    if (dino or face) and pictures is None:
        raise ValueError("DINO and face scores compare with the subject: give reference images")
    if not (bundled or clip or dino or face):
        raise ValueError("there is nothing to score with: name a clip, dino or face model")
    scorers = Scorers(clip, dino, face, bundled, pictures)
    wanted = _wanted(prompts, loaded[0], bundled)
    drawn = list(_jobs(wanted, names))
    if not drawn:
        raise ValueError("the prompts are for two subjects, and there is one: give two, or others")
    scorers.check(job.prompt for job in drawn)
    usual = SAMPLING if bundled else {"steps": 30, "guidance": 7.5}
    sampling = {
        "steps": usual["steps"] if steps is None else steps,
        "guidance": usual["guidance"] if guidance is None else guidance,
    }
    folder = user_path(output)
    check_folder(folder / "pictures")
    pipe = model
    if not ready:
        pipe = load_pipeline(**wanted_model)
        pipe.set_progress_bar_config(disable=True)
    loaded_with = "".join(f"|{wanted_model[n]}" for n in ("config", "vae") if wanted_model[n])
    rows: list[dict[str, Any]] = []
    shown: list[tuple[Drawn, Image.Image]] = []
    for job in tqdm(drawn, unit="prompt", disable=not progress):
        images = _draw(pipe, job, loaded, folder / "pictures", seeds, sampling, loaded_with)
        shown.append((job, images[0]))
        scored = scorers(images, job, loaded)
        for seed, scores in enumerate(scored):
            row = {"subject": job.name, "kind": job.kind, "prompt": job.prompt, "seed": seed}
            rows.append(row | scores)
    found = Evaluation(tuple(rows), ())
    return replace(found, files=tuple(write_evaluation(folder, found, shown, names)))


def _names(given: Iterable[Any]) -> list[str]:
    """Of files their names, of others their placeholders; numbered where two are alike."""
    plain = [one.placeholder if isinstance(one, Subject) else Path(one).stem for one in given]
    return [
        f"{name} ({place + 1})" if plain.count(name) > 1 or name == CONTROL else name
        for place, name in enumerate(plain)
    ]


def _wanted(prompts: Any, subject: Subject, bundled: bool) -> Prompts:
    if prompts is None:
        return prompts_for(subject.class_word, bundled)
    if isinstance(prompts, (str, os.PathLike)):
        return read_prompts(os.fspath(prompts))
    found = prompts if isinstance(prompts, Mapping) else {"prompts": tuple(prompts)}
    for sentence in (sentence for sentences in found.values() for sentence in sentences):
        if not 1 <= sentence.count("{}") <= 2:
            raise ValueError(
                f"the prompt {sentence!r} has {sentence.count('{}')} times {{}}: write it where "
                "the subject stands, or twice for two subjects"
            )
    return found


def _jobs(prompts: Prompts, names: Sequence[str]) -> Iterator[Drawn]:
    """Each prompt with each subject, or each two in a row, first with their class words."""
    count = len(names)
    for kind, sentences in prompts.items():
        for prompt in sentences:
            for first in range(count):
                places = (first, (first + 1) % count)[: prompt.count("{}")]
                if len(set(places)) < len(places):
                    continue
                for control in (True, False):
                    name = CONTROL if control else " + ".join(names[place] for place in places)
                    yield Drawn(name, kind, prompt, places, control)


def _draw(
    pipe: Any,
    job: Drawn,
    subjects: Sequence[Subject],
    folder: Path,
    seeds: int,
    sampling: Mapping[str, Any],
    loaded_with: str,
) -> list[Image.Image]:
    """The images of a job, from the folder if they are all there."""
    # Two subjects may have the same placeholder; here each gets one by its place.
    own = [replace(subjects[p], placeholder=f"<subject-{p + 1}>") for p in job.subjects]
    words = [one.class_word if job.control else one.placeholder for one in own]
    text = filled(job.prompt, words)
    digest = hashlib.sha256(f"{text}|{sorted(sampling.items())}".encode())
    digest.update((str(getattr(pipe.config, "_name_or_path", "")) + loaded_with).encode())
    for one in own if not job.control else ():
        for tokens in one.tokens:
            digest.update(tokens.numpy().tobytes())
    paths = [folder / f"{digest.hexdigest()[:16]}-{seed}.png" for seed in range(seeds)]
    if all(path.exists() for path in paths):
        return [load_image(path) for path in paths]
    # A pipeline that was given may have subjects of its own, which are to be there afterwards.
    encoder = EncodePromptPatch.of(pipe)
    before = () if encoder is None else encoder.subjects
    if not job.control:
        attach(pipe, own)
    try:
        with torch.inference_mode():
            images = generate(pipe, text, n=seeds, **sampling)
    finally:
        if not job.control:
            attach(pipe, before) if before else detach(pipe)
    for path, image in zip(paths, images, strict=True):
        atomic_write(path, png(image))
    return images
