"""Score trained subjects: `sefi_fast.evaluation.evaluate`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from tqdm.auto import tqdm

from sefi_fast.evaluation.prompts import Prompts, check_prompt, filled, prompts_for, read_prompts
from sefi_fast.evaluation.scorers import ClipScorer, DinoScorer, FaceScorer
from sefi_fast.evaluation.sheets import Panel, contact_sheet, png
from sefi_fast.evaluation.statistics import bootstrap
from sefi_fast.evaluation.tables import csv_bytes, markdown_table, write_files
from sefi_fast.pipelines import attach, detach, generate, load_pipeline
from sefi_fast.pipelines.encode_prompt import EncodePromptPatch
from sefi_fast.pipelines.loading import kept_model
from sefi_fast.subject import Subject
from sefi_fast.training.image import load_image
from sefi_fast.utils.files import atomic_write, check_folder, user_path

if TYPE_CHECKING:
    import numpy as np

    ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray

CONTROL = "class word"
"""Name of the rows whose images have the class word in place of the subject."""
_TEXT_COLUMNS = ("subject", "kind", "prompt", "seed")
_PANELS_PER_ROW = 8
_JUDGE_COLUMNS = {"prompt": "prompt score", "share": "attributes"}
_JUDGE_ID_COLUMNS = {"id": "id", "rank": "id rank", "id_p": "id(p)", "leak": "leak"}


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        rows: one per image: subject, kind, prompt, seed, and each score by name. "prompt score",
            "attributes", "id", "id rank" and "leak" are the bundled model's judge's. "clip text",
            "clip image", "dino image" and "face" are cosine similarities. "id(p)" is ID · Prompt,
            our reading of the authors' score. ID is the judge's, else the face's, DINO's or CLIP's
            image score; Prompt is the judge's, else CLIP's text score.
        files: the files that were written.
    """

    rows: tuple[dict[str, Any], ...]
    files: tuple[Path, ...]

    @property
    def scores(self) -> list[str]:
        """Return the names of the scores."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in _TEXT_COLUMNS]

    def mean(self, score: str, subject: str, kind: str | None = None) -> float | None:
        """Return the mean over a subject's images of one kind or all; None if there are none."""
        values = [
            row[score]
            for row in self.rows
            if row["subject"] == subject and kind in (None, row["kind"]) and score in row
        ]
        return sum(values) / len(values) if values else None


class _Trial(NamedTuple):
    """One prompt of a class with subjects by index, or with their class words (control)."""

    name: str
    kind: str
    prompt: str
    subjects: tuple[int, ...]
    control: bool


def evaluate(
    subjects: Subject | str | os.PathLike[str] | Sequence[Subject | str | os.PathLike[str]],
    *,
    model: Any = None,
    model_config: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    prompts: Prompts | Sequence[str] | str | os.PathLike[str] | None = None,
    references: Sequence[ImageSource] | None = None,
    seeds: int = 4,
    steps: int | None = None,
    guidance: float | None = None,
    clip: str | os.PathLike[str] | None = None,
    dino: str | os.PathLike[str] | None = None,
    face: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = "evaluation",
    progress: bool = True,
) -> Evaluation:
    """Generate images of trained subjects, and of their class words, and score them.

    Images that the folder already holds are not generated again, so the same call resumes an
    interrupted run. On the bundled model the judge scores without any other model. The models of
    the scores are the user's: transformers downloads a hub id, and loads a folder as it is.

    Args:
        subjects: one or several subjects, or their files.
        model: as for `load_pipeline`, or a pipeline. Default: the first subject's model.
        model_config, vae: as `config` and `vae` for `load_pipeline`. Default with the first
            subject's model: those that it was trained with.
        prompts: class → sentences, sentences, or a file of them (`prompts.read_prompts`). Each has
            {} in place of the subject, or twice for two subjects, which follow one another in the
            list. Default: prompts that suit the class word.
        references: the image that each subject was trained on, for the image scores.
        seeds: images per prompt.
        steps, guidance: settings of the sampler. Default: those that suit the model.
        clip: a CLIP model for text and image scores.
        dino: a DINO or DINOv2 model for image scores.
        face: an insightface model pack for face scores.
        output: folder of images, scores (CSV), table (Markdown) and sheet.
        progress: whether to show a progress bar.

    Raises:
        ValueError: there is nothing to generate or to score with, or the number of references
            differs from the number of subjects.
        PromptError: a prompt for the bundled model asks for something that its judge cannot read,
            or as for `generate`.
        SubjectFileError, ModelError, ImageError: as for `attach` and `generate`.
    """
    given = [subjects] if isinstance(subjects, (Subject, str, os.PathLike)) else list(subjects)
    if not given:
        raise ValueError("evaluate got no subject. Give at least one.")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    loaded = [one if isinstance(one, Subject) else Subject.load(os.fspath(one)) for one in given]
    source = {"model": model, "config": model_config, "vae": vae}
    if model is None:
        kept = kept_model(loaded[0])
        source = {n: kept[n] if value is None else value for n, value in source.items()}
    bundled = source["model"] is None
    ready = not (bundled or isinstance(source["model"], (str, os.PathLike)))
    if ready and (model_config is not None or vae is not None):
        raise ValueError(
            "A ready pipeline was given, and model_config and vae are for a model that is loaded. "
            "Leave them out, and set pipe.vae instead."
        )
    scorers = _Scorers(loaded, references, clip, dino, face, bundled)
    names = _names(given)
    trials = list(_trials(_prompts(prompts, loaded[0], bundled), names))
    if not trials:
        raise ValueError(
            "The prompts are for two subjects, and one was given. Give two, or others."
        )
    scorers.check(trials)
    sampling = {"steps": 30, "guidance": 7.5}
    if bundled:
        from sefi_fast.tiny_world import SAMPLING

        sampling = dict(SAMPLING)
    asked = {"steps": steps, "guidance": guidance}
    sampling |= {name: value for name, value in asked.items() if value is not None}
    folder = user_path(output)
    check_folder(folder / "images")
    pipe = source["model"]
    if not ready:
        pipe = load_pipeline(**source)
        pipe.set_progress_bar_config(disable=True)
    parts = "".join(f"|{source[name]}" for name in ("config", "vae") if source[name])
    rows: list[dict[str, Any]] = []
    panels: dict[str, list[Panel]] = {}
    for trial in tqdm(trials, unit="prompt", disable=not progress):
        found = _generate(pipe, trial, loaded, folder / "images", seeds, sampling, parts)
        panels.setdefault(trial.name, []).append(Panel(found[0], trial.prompt))
        for seed, scores in enumerate(scorers(found, trial)):
            row = {"subject": trial.name, "kind": trial.kind, "prompt": trial.prompt, "seed": seed}
            rows.append(row | scores)
    result = Evaluation(tuple(rows), ())
    return replace(result, files=tuple(_write(folder, result, panels, names)))


def _names(given: Iterable[Subject | str | os.PathLike[str]]) -> list[str]:
    """Name subjects by placeholder or file, with numbers if two are alike."""
    plain = [one.placeholder if isinstance(one, Subject) else Path(one).stem for one in given]
    return [
        f"{name} ({place + 1})" if plain.count(name) > 1 or name == CONTROL else name
        for place, name in enumerate(plain)
    ]


def _prompts(
    prompts: Prompts | Sequence[str] | str | os.PathLike[str] | None,
    subject: Subject,
    bundled: bool,
) -> Prompts:
    if prompts is None:
        return prompts_for(subject.class_word, bundled)
    if isinstance(prompts, (str, os.PathLike)):
        return read_prompts(os.fspath(prompts))
    found = prompts if isinstance(prompts, Mapping) else {"prompts": tuple(prompts)}
    for sentences in found.values():
        for sentence in sentences:
            check_prompt(sentence)
    return found


def _trials(prompts: Prompts, names: Sequence[str]) -> Iterator[_Trial]:
    """Yield each prompt with each subject, or each two that follow one another, and the control."""
    for kind, sentences in prompts.items():
        for prompt in sentences:
            for first in range(len(names)):
                places = (first, (first + 1) % len(names))[: prompt.count("{}")]
                if len(set(places)) == len(places):
                    yield _Trial(CONTROL, kind, prompt, places, True)
                    name = " + ".join(names[place] for place in places)
                    yield _Trial(name, kind, prompt, places, False)


class _Scorers:
    """Scores of images by the models given. The arguments are those of `evaluate`."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        references: Sequence[ImageSource] | None,
        clip: str | os.PathLike[str] | None,
        dino: str | os.PathLike[str] | None,
        face: str | os.PathLike[str] | None,
        bundled: bool,
    ) -> None:
        if not (bundled or clip or dino or face):
            raise ValueError("There is nothing to score with. Name a clip, dino or face model.")
        if (dino or face) and references is None:
            raise ValueError("DINO and face scores compare with the subject. Give references.")
        if references is not None and len(references) != len(subjects):
            raise ValueError(
                f"There are {len(references)} reference images for {len(subjects)} subjects. Give "
                "one for each, in the same order."
            )
        self._subjects = subjects
        self._references = [load_image(one) for one in references or ()]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._clip = ClipScorer(clip, device) if clip else None
        self._by_image: dict[str, ClipScorer | DinoScorer | FaceScorer] = {}
        if self._clip is not None and references:
            self._by_image["clip image"] = self._clip
        if dino:
            self._by_image["dino image"] = DinoScorer(dino, device)
        if face:
            self._by_image["face"] = FaceScorer(face)
        self._judge = None
        if bundled:
            from sefi_fast.evaluation.judge_scorer import JudgeScorer

            self._judge = JudgeScorer()

    def check(self, trials: Iterable[_Trial]) -> None:
        """Raise PromptError if the judge cannot read something that a prompt asks for."""
        if self._judge is not None:
            from sefi_fast.evaluation.judge_scorer import asked_by

            for trial in trials:
                asked_by(trial.prompt)

    def __call__(self, images: Sequence[Image.Image], trial: _Trial) -> list[dict[str, float]]:
        """Return the scores of each image; with two subjects, the mean of their image scores."""
        columns: dict[str, list[float]] = {}
        references = [self._references[place] for place in trial.subjects if self._references]
        if self._clip is not None:
            words = [self._subjects[place].class_word for place in trial.subjects]
            columns["clip text"] = self._clip.text(images, filled(trial.prompt, words))
        for name, scorer in self._by_image.items():
            each = [scorer.image(images, reference) for reference in references]
            columns[name] = [sum(values) / len(values) for values in zip(*each, strict=True)]
        if self._judge is not None:
            # The judge reads one creature per image.
            scores = self._judge(images, trial.prompt, (references or images)[0])
            names = _JUDGE_COLUMNS | (_JUDGE_ID_COLUMNS if len(references) == 1 else {})
            columns |= {names[n]: [getattr(score, n) for score in scores] for n in names}
        else:
            identity = next((n for n in ("face", "dino image", "clip image") if n in columns), "")
            if identity and self._clip is not None:
                both = zip(columns[identity], columns["clip text"], strict=True)
                columns["id(p)"] = [max(0.0, one) * max(0.0, text) for one, text in both]
        return [
            {name: round(values[place], 5) for name, values in columns.items()}
            for place in range(len(images))
        ]


def _generate(
    pipe: Any,
    trial: _Trial,
    subjects: Sequence[Subject],
    folder: Path,
    seeds: int,
    sampling: Mapping[str, Any],
    parts: str,
) -> list[Image.Image]:
    """Return the images of a trial, from the folder if all are there."""
    # Two subjects may have the same placeholder, so each gets one by its place.
    own = [replace(subjects[p], placeholder=f"<subject-{p + 1}>") for p in trial.subjects]
    words = [one.class_word if trial.control else one.placeholder for one in own]
    text = filled(trial.prompt, words)
    digest = hashlib.sha256(f"{text}|{sorted(sampling.items())}".encode())
    digest.update((str(getattr(pipe.config, "_name_or_path", "")) + parts).encode())
    for one in own if not trial.control else ():
        for tokens in one.tokens:
            digest.update(tokens.numpy().tobytes())
    paths = [folder / f"{digest.hexdigest()[:16]}-{seed}.png" for seed in range(seeds)]
    if all(path.exists() for path in paths):
        return [load_image(path) for path in paths]
    # A pipeline of the user's gets its own subjects back.
    encoder = EncodePromptPatch.of(pipe)
    before = () if encoder is None else encoder.subjects
    if not trial.control:
        attach(pipe, own)
    try:
        with torch.inference_mode():
            images = generate(pipe, text, n=seeds, **sampling)
    finally:
        if not trial.control:
            attach(pipe, before) if before else detach(pipe)
    for path, image in zip(paths, images, strict=True):
        atomic_write(path, png(image))
    return images


def _write(
    folder: Path, found: Evaluation, panels: Mapping[str, Sequence[Panel]], names: Sequence[str]
) -> list[Path]:
    """Write scores (CSV), means (Markdown) and a sheet with the first image of each prompt."""
    rows = [
        (name if start == 0 else "", row[start : start + _PANELS_PER_ROW])
        for name, row in panels.items()
        for start in range(0, len(row), _PANELS_PER_ROW)
    ]
    contents = {
        "scores.csv": csv_bytes(found.rows),
        "scores.md": _means(found, names).encode(),
        "sheet.png": png(contact_sheet(rows, title="first seed, nothing picked")),
    }
    return write_files(folder, contents)


def _means(found: Evaluation, names: Sequence[str]) -> str:
    """Tabulate the means: control, all subjects with an interval, each kind, each subject."""

    def of_one(subject: str) -> list[str]:
        means = (found.mean(score, subject) for score in found.scores)
        return ["—" if mean is None else f"{mean:.3f}" for mean in means]

    def of_all(kind: str | None = None) -> list[str]:
        cells = []
        for score in found.scores:
            means = {place: found.mean(score, name, kind) for place, name in enumerate(names)}
            known = {place: mean for place, mean in means.items() if mean is not None}
            cells.append(str(bootstrap(known)) if known else "—")
        return cells

    kinds = dict.fromkeys(row["kind"] for row in found.rows)
    subjects = dict.fromkeys(row["subject"] for row in found.rows if row["subject"] != CONTROL)
    rows = [[f"the {CONTROL}", *of_one(CONTROL)], ["all subjects", *of_all()]]
    rows += [[f"all subjects, {kind}", *of_all(kind)] for kind in kinds]
    rows += [[subject, *of_one(subject)] for subject in subjects]
    return markdown_table(["images of", *found.scores], rows)
