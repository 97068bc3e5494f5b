"""All scores that were asked for, of the pictures of one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from sefi_fast.evaluation.encoders import ClipScorer, DinoScorer, FaceScorer
from sefi_fast.evaluation.evaluation_report import Drawn
from sefi_fast.evaluation.prompt_classes import filled
from sefi_fast.evaluation.tiny_scorer import TinyScorer, asked_by
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD


class Scorers:
    """Scores pictures by the models given; the arguments are those of `evaluate`.

    Args:
        clip, dino, face: models, or None for no such score.
        bundled: whether the bundled model's judge scores too.
        references: the picture that each subject was learnt from.
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
        """Scores of each picture; with two subjects the mean of their image scores."""
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
        # The judge knows one creature a picture.
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
