"""Scores of a picture of the tiny world: Prompt, ID and ID(P), by the independent judge."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache

import numpy as np

from sefi_fast.evaluation.tiny_prompts import StudyPrompt
from sefi_fast.tiny_world.drawing import Identity, identities
from sefi_fast.tiny_world.judge import ATTRIBUTES, IDENTITY_ATTRIBUTES, Judgement


@dataclass(frozen=True)
class PictureScore:
    """What the judge says of one picture drawn for a prompt.

    Attributes:
        prompt: 1 if every attribute that the prompt asks for is there, else 0.
        share: share of those attributes that are there.
        id: mean probability of the identity's values, over the identity attributes that the prompt
            leaves alone, 0..1.
        rank: share of all other identities for which that mean is lower, ties counted half; 0.5
            for a picture that shows no identity in particular.
        id_p: ID counted only as far as the prompt is obeyed: ``id · prompt``. The authors name
            such a score and give no formula; this is our reading.
        leak: 1 if the scene is the training picture's, though another was asked for, else 0.
    """

    prompt: float
    share: float
    id: float
    rank: float
    id_p: float
    leak: float

    def as_dict(self) -> dict[str, float]:
        """All scores by name."""
        return asdict(self)


SCORES = tuple(PictureScore.__dataclass_fields__)


def score_picture(
    judgement: Judgement, prompt: StudyPrompt, identity: Identity, reference_scene: str
) -> PictureScore:
    """Score a picture that was drawn for a prompt with this identity as its subject.

    Args:
        judgement: what the judge says of the picture.
        prompt: what was asked for.
        identity: the subject's.
        reference_scene: the scene of the picture that the subject was learnt from.
    """
    labels = judgement.labels
    hits = [labels[name] == value for name, value in prompt.wanted.items()]
    kept = [name for name in IDENTITY_ATTRIBUTES if name not in prompt.change]
    own, others = _likeness(judgement, identity, tuple(kept))
    rank = float(np.mean((others < own) + 0.5 * (others == own)))
    obeyed = float(all(hits))
    leaks = labels["scene"] == reference_scene and prompt.wanted.get("scene") != reference_scene
    return PictureScore(
        prompt=obeyed,
        share=sum(hits) / len(hits),
        id=own,
        rank=rank,
        id_p=own * obeyed,
        leak=float(leaks),
    )


def _likeness(
    judgement: Judgement, identity: Identity, names: tuple[str, ...]
) -> tuple[float, np.ndarray]:
    """Mean probability of an identity's values, and of those of every other identity."""
    table = _table(names)
    own = np.array([_place(identity, name) for name in names])
    chances = [np.array(list(judgement.probabilities[name].values())) for name in names]
    likeness = np.mean(
        [chance[column] for chance, column in zip(chances, table.T, strict=True)], axis=0
    )
    mine = float(np.mean([chance[place] for chance, place in zip(chances, own, strict=True)]))
    # Identities that differ in nothing but the changed attribute look the same here.
    return mine, likeness[(table != own).any(axis=1)]


@cache
def _table(names: tuple[str, ...]) -> np.ndarray:
    """Place of each identity's value in each attribute, int64 [identities, attributes]."""
    return np.array([[_place(one, name) for name in names] for one in identities()])


def _place(identity: Identity, name: str) -> int:
    return ATTRIBUTES[name].index(identity.value(name))
