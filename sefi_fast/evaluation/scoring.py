"""Scores of finished subjects on any model: pictures of prompts, judged by models of choice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from sefi_fast.evaluation.evaluation_report import (
    CONTROL,
    Drawn,
    Evaluation,
    write_evaluation,
)
from sefi_fast.evaluation.prompt_classes import Prompts, filled, prompts_for, read_prompts
from sefi_fast.evaluation.sheets import png
from sefi_fast.evaluation.subject_scores import Scorers
from sefi_fast.pipelines import attach, detach, generate, load_pipeline
from sefi_fast.pipelines.loading import kept_model
from sefi_fast.pipelines.prompt_encoder import PromptEncoder
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import SAMPLING
from sefi_fast.training.image import load_image
from sefi_fast.training.output import check_folder
from sefi_fast.utils.files import atomic_write, user_path

if TYPE_CHECKING:
    import numpy as np

    Picture = str | os.PathLike[str] | Image.Image | np.ndarray


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
    """Draw prompts with finished subjects, and with their class words, and score the pictures.

    Pictures that the folder already holds are not drawn again, so a run that was ended goes on with
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
        references: the picture that each subject was learnt from, for the image scores.
        seeds: pictures of each prompt.
        steps, guidance: of the sampler; default: what suits the model.
        clip: a CLIP model for text and image scores.
        dino: a DINO or DINOv2 model for image scores.
        face: an insightface model pack for face scores.
        output: folder for pictures, scores (CSV), table (Markdown) and sheet.
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
            f"there are {len(pictures)} reference pictures for {len(loaded)} subjects: give one "
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
        raise ValueError("DINO and face scores compare with the subject: give reference pictures")
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
    """The pictures of a job, from the folder if they are all there."""
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
    encoder = PromptEncoder.of(pipe)
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
