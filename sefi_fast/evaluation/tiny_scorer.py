"""Scores of pictures of the bundled model by any prompt: the judge reads what the words ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from PIL import Image

from sefi_fast.errors import PromptError
from sefi_fast.evaluation.scores import PictureScore, score_picture
from sefi_fast.evaluation.tiny_prompts import StudyPrompt
from sefi_fast.tiny_world.captions import CLASS_WORD, PATTERN_NOUNS
from sefi_fast.tiny_world.drawing import ACCESSORIES, POSITIONS, SCENES, Identity
from sefi_fast.tiny_world.judge import ATTRIBUTES, IDENTITY_ATTRIBUTES, Judge

_PATTERNS = {noun: pattern for pattern, noun in PATTERN_NOUNS.items()}
_PICTURES = ("photo", "picture", "image", "drawing")
_NOUNS: dict[str, tuple[str, ...]] = {
    CLASS_WORD: ("colour", "shape", "pattern"),
    "ears": ("ears",),
    **dict.fromkeys(_PATTERNS, ("second_colour",)),
    **dict.fromkeys(_PICTURES, ("style",)),
    **dict.fromkeys((*ACCESSORIES, *SCENES, "background"), ()),
}
"""Attributes that words before a noun ask for; of accessories and scenes the judge tells none."""
_ASK_NOTHING = {
    *("a", "an", "the", "my", "this", "that", "one", "of", "in", "on", "at", "with", "and"),
    *("next", "to", "wearing", "holding", "background", "ears"),
    *_PICTURES,
    CLASS_WORD,
}


class TinyScorer:
    """The judge as a scorer of subjects that were learnt from one picture."""

    def __init__(self) -> None:
        self._judge = Judge.load()

    def identity(self, picture: Image.Image) -> tuple[Identity, str]:
        """Whom a picture shows, and the scene."""
        labels = self._judge([picture])[0].labels
        colour, second, pattern = (labels[n] for n in ("colour", "second_colour", "pattern"))
        # They are judged apart, but an identity has a pattern and its colour, or neither.
        if pattern == "plain" or second in ("none", colour):
            return Identity(colour, None, "plain", labels["ears"], labels["shape"]), labels["scene"]
        return Identity(colour, second, pattern, labels["ears"], labels["shape"]), labels["scene"]

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], reference: Image.Image
    ) -> list[PictureScore]:
        """Score pictures, each drawn for its own prompt, against the subject of the reference.

        Raises:
            PromptError: as `asked_by`.
        """
        identity, scene = self.identity(reference)
        return [
            score_picture(judgement, asked_by(prompt), identity, scene)
            for judgement, prompt in zip(self._judge(images), prompts, strict=True)
        ]


def asked_by(prompt: str) -> StudyPrompt:
    """What a prompt asks for, in the judge's terms.

    Args:
        prompt: the sentence, with `CLASS_WORD` where the subject stands.

    Raises:
        PromptError: a word of it asks for something that the judge does not tell, so that every
            picture would count as obedient; or it leaves nothing of the subject's identity.
    """
    wanted = wanted_by(prompt)
    change = {name: value for name, value in wanted.items() if name in IDENTITY_ATTRIBUTES}
    if len(change) == len(IDENTITY_ATTRIBUTES):
        raise PromptError(
            f"the prompt {prompt!r} asks for another {', '.join(change)}: nothing of the subject "
            "is left to be recognised by; leave one of them out"
        )
    return StudyPrompt("", "", wanted, change)


def wanted_by(prompt: str) -> dict[str, str]:
    """Attribute of the judge → the value that the words of a prompt ask for.

    Raises:
        PromptError: as `asked_by`.
    """
    words = re.findall(r"\w+", prompt.lower())
    wanted = {"creature": "yes"}
    untold = []
    for place, word in enumerate(words):
        asked = _asks_for(word, next((noun for noun in words[place + 1 :] if noun in _NOUNS), ""))
        for name, value in asked.items():
            # Two scenes, or two colours of one thing: the judge tells one.
            if wanted.setdefault(name, value) != value:
                untold.append(word)
        if not asked and word not in _ASK_NOTHING:
            untold.append(word)
    if untold:
        raise PromptError(
            f"the bundled model's judge cannot tell whether a picture obeys {_quoted(untold)} in "
            f"the prompt {prompt!r}. It tells one scene ({', '.join(SCENES)}), one position "
            f"({', '.join(POSITIONS)}), the accessories {', '.join(ACCESSORIES)}, and of the "
            "creature colour, shape, ears, stripes and spots: leave other words out"
        )
    return wanted


def _asks_for(word: str, noun: str) -> dict[str, str]:
    """What a word asks for that stands before this noun; nothing if that cannot be told."""
    if word in ACCESSORIES:
        return {word: "yes"}
    if word in _PATTERNS:
        return {"pattern": _PATTERNS[word]}
    for name in ("scene", "position", *_NOUNS.get(noun, ())):
        if word in ATTRIBUTES[name]:
            return {name: word}
    return {}


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(words)))
