"""Score images of the bundled model by the judge of the tiny world."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from sefi_fast.errors import PromptError
from sefi_fast.evaluation.prompts import filled
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.tiny_world.captions import PATTERN_NOUNS
from sefi_fast.tiny_world.drawing import ACCESSORIES, POSITIONS, SCENES, Identity, identities
from sefi_fast.tiny_world.judge import ATTRIBUTES, IDENTITY_ATTRIBUTES, Judge, Judgement


@dataclass(frozen=True)
class AskedAttributes:
    """Attributes that a prompt asks for.

    Attributes:
        wanted: attribute of the judge → the value that the prompt asks for.
        change: attributes of the identity that the prompt overrides, with their values.
    """

    wanted: dict[str, str] = field(hash=False)
    change: dict[str, str] = field(hash=False, default_factory=dict)


class ImageScore(NamedTuple):
    """Scores of one image that was generated for a prompt.

    Attributes:
        prompt: 1 if the image shows every attribute that the prompt asks for, else 0.
        share: share of those attributes that the image shows.
        id: mean probability of the identity's values, over the identity attributes that the prompt
            leaves alone, 0..1.
        rank: share of all other identities with a lower mean, ties counted half. An image that
            shows no identity in particular has 0.5.
        id_p: ``id · prompt``. The authors name such a score without a formula; this is our reading.
        leak: 1 if the scene is the training image's although the prompt asks for another, else 0.
    """

    prompt: float
    share: float
    id: float
    rank: float
    id_p: float
    leak: float


def score_image(
    judgement: Judgement, prompt: AskedAttributes, identity: Identity, reference_scene: str
) -> ImageScore:
    """Score an image that was generated for a prompt with this identity as its subject.

    Args:
        judgement: the judge's answers for the image.
        prompt: the attributes that the prompt asks for.
        identity: the subject's identity.
        reference_scene: scene of the image that the subject was trained on.
    """
    labels = judgement.labels
    hits = [labels[name] == value for name, value in prompt.wanted.items()]
    kept = tuple(name for name in IDENTITY_ATTRIBUTES if name not in prompt.change)
    table = _value_places(kept)
    own = np.array([_place(identity, name) for name in kept])
    chances = [np.array(list(judgement.probabilities[name].values())) for name in kept]
    id_score = float(np.mean([chance[k] for chance, k in zip(chances, own, strict=True)]))
    others = np.mean([chance[k] for chance, k in zip(chances, table.T, strict=True)], axis=0)
    # Identities that differ in nothing but a changed attribute look the same here.
    others = others[(table != own).any(axis=1)]
    obeyed = float(all(hits))
    leaks = labels["scene"] == reference_scene and prompt.wanted.get("scene") != reference_scene
    return ImageScore(
        prompt=obeyed,
        share=sum(hits) / len(hits),
        id=id_score,
        rank=float(np.mean((others < id_score) + 0.5 * (others == id_score))),
        id_p=id_score * obeyed,
        leak=float(leaks),
    )


@cache
def _value_places(names: tuple[str, ...]) -> np.ndarray:
    """Return the index of each identity's value, int64 [identities, attributes]."""
    return np.array([[_place(one, name) for name in names] for one in identities()])


def _place(identity: Identity, name: str) -> int:
    return ATTRIBUTES[name].index(identity.value(name))


_PATTERNS = {noun: pattern for pattern, noun in PATTERN_NOUNS.items()}
_IMAGE_WORDS = ("photo", "picture", "image", "drawing")
_NOUNS: dict[str, tuple[str, ...]] = {
    CLASS_WORD: ("colour", "shape", "pattern"),
    "ears": ("ears",),
    **dict.fromkeys(_PATTERNS, ("second_colour",)),
    **dict.fromkeys(_IMAGE_WORDS, ("style",)),
    **dict.fromkeys((*ACCESSORIES, *SCENES, "background"), ()),
}
"""Attributes that a word before a noun asks for. The judge reads none of accessories and scenes."""
_ASK_NOTHING = {
    *("a", "an", "the", "my", "this", "that", "one", "of", "in", "on", "at", "with", "and"),
    *("next", "to", "wearing", "holding", "background", "ears"),
    *_IMAGE_WORDS,
    CLASS_WORD,
}


class JudgeScorer:
    """The judge as a scorer of subjects that were trained on one image."""

    def __init__(self) -> None:
        self._judge = Judge.load()

    def identity(self, image: Image.Image) -> tuple[Identity, str]:
        """Return the identity and the scene that an image shows."""
        labels = self._judge([image])[0].labels
        colour, second, pattern = (labels[n] for n in ("colour", "second_colour", "pattern"))
        # The judge reads them separately, but an identity has a pattern and its colour, or neither.
        if pattern == "plain" or second in ("none", colour):
            return Identity(colour, None, "plain", labels["ears"], labels["shape"]), labels["scene"]
        return Identity(colour, second, pattern, labels["ears"], labels["shape"]), labels["scene"]

    def __call__(
        self, images: Sequence[Image.Image], prompt: str, reference: Image.Image
    ) -> list[ImageScore]:
        """Score images of one prompt against the subject of the reference image.

        Raises:
            PromptError: as `asked_by`.
        """
        asked = asked_by(prompt)
        identity, scene = self.identity(reference)
        return [score_image(one, asked, identity, scene) for one in self._judge(images)]


def asked_by(prompt: str) -> AskedAttributes:
    """Return the attributes that a prompt asks for.

    Args:
        prompt: the sentence, with `CLASS_WORD` or {} in place of the subject.

    Raises:
        PromptError: a word asks for something that the judge cannot read, so that every image
            would count as obedient; or the prompt overrides the whole identity of the subject.
    """
    words = re.findall(r"\w+", filled(prompt, [CLASS_WORD] * prompt.count("{}")).lower())
    wanted = {"creature": "yes"}
    unread = []
    for place, word in enumerate(words):
        asked = _asks_for(word, next((noun for noun in words[place + 1 :] if noun in _NOUNS), ""))
        for name, value in asked.items():
            # The judge reads one scene, and one color of each part.
            if wanted.setdefault(name, value) != value:
                unread.append(word)
        if not asked and word not in _ASK_NOTHING:
            unread.append(word)
    if unread:
        raise PromptError(
            "The bundled model's judge cannot tell whether an image obeys "
            f"{', '.join(map(repr, dict.fromkeys(unread)))} in the prompt {prompt!r}. It reads one "
            f"scene ({', '.join(SCENES)}), one position ({', '.join(POSITIONS)}), the accessories "
            f"{', '.join(ACCESSORIES)}, and the creature's colour, shape, ears, stripes and spots. "
            "Leave other words out."
        )
    change = {name: value for name, value in wanted.items() if name in IDENTITY_ATTRIBUTES}
    if len(change) == len(IDENTITY_ATTRIBUTES):
        raise PromptError(
            f"The prompt {prompt!r} overrides {', '.join(change)}. Nothing of the subject is left "
            "to be recognised. Leave one of them out."
        )
    return AskedAttributes(wanted, change)


def _asks_for(word: str, noun: str) -> dict[str, str]:
    """Return the attribute that a word before this noun asks for; nothing if there is none."""
    if word in ACCESSORIES:
        return {word: "yes"}
    if word in _PATTERNS:
        return {"pattern": _PATTERNS[word]}
    for name in ("scene", "position", *_NOUNS.get(noun, ())):
        if word in ATTRIBUTES[name]:
            return {name: word}
    return {}
