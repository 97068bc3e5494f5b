"""Scores of pictures of the bundled model by any prompt: the judge reads what the words ask for."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from sefi_fast.evaluation.scores import PictureScore, score_picture
from sefi_fast.evaluation.tiny_prompts import StudyPrompt
from sefi_fast.tiny_world.captions import PATTERN_NOUNS
from sefi_fast.tiny_world.drawing import ACCESSORIES, COLOURS, Identity
from sefi_fast.tiny_world.judge import ATTRIBUTES, Judge


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
        """Score pictures, each drawn for its own prompt, against the subject of the reference."""
        identity, scene = self.identity(reference)
        return [
            score_picture(judgement, _asked(prompt), identity, scene)
            for judgement, prompt in zip(self._judge(images), prompts, strict=True)
        ]


def wanted_by(prompt: str) -> dict[str, str]:
    """Attribute of the judge → the value that the words of a prompt ask for."""
    words = prompt.lower().replace(",", " ").split()
    wanted = {"creature": "yes"}
    for name in ("scene", "position", "ears", "shape", "pattern"):
        named = [word for word in words if word in ATTRIBUTES[name]]
        if named:
            wanted[name] = named[-1]
    nouns = {noun: pattern for pattern, noun in PATTERN_NOUNS.items()}
    for before, word in zip(["", *words], words, strict=False):
        if word in nouns:
            wanted["pattern"] = nouns[word]
            if before in COLOURS:
                wanted["second_colour"] = before
    if "grey" in words:
        wanted["style"] = "grey"
    return wanted | {name: "yes" for name in ACCESSORIES if name in words}


def _asked(prompt: str) -> StudyPrompt:
    wanted = wanted_by(prompt)
    identity = ("ears", "shape", "pattern", "second_colour")
    change = {name: value for name, value in wanted.items() if name in identity}
    return StudyPrompt("", "", wanted, change)
