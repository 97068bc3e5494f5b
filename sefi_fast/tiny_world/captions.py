"""Captions of drawn images, with random wording. Every word is one token of the vocabulary."""

from __future__ import annotations

import random
from itertools import chain

from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.tiny_world.drawing import (
    ACCESSORIES,
    COLOURS,
    EARS,
    PATTERNS,
    POSITIONS,
    SCENES,
    SHAPES,
    ImageSpec,
)

SCENE_PHRASES = {
    scene: {"beach": "on the beach", "night": "at night"}.get(scene, f"in the {scene}")
    for scene in SCENES
}
POSITION_PHRASES = {
    position: "in the middle" if position == "middle" else f"on the {position}"
    for position in POSITIONS
}
PATTERN_NOUNS = {"striped": "stripes", "spotted": "spots"}
_STRUCTURE = "a an the of in on at and with photo picture image drawing ears grey"
_SPARE = "my one wearing next to sks xyz background big small cute holding this that"
_ATTRIBUTES = (
    COLOURS,
    PATTERNS,
    PATTERN_NOUNS.values(),
    EARS,
    SHAPES,
    SCENES,
    ACCESSORIES,
    POSITIONS,
)
VOCABULARY: tuple[str, ...] = tuple(
    sorted({*_STRUCTURE.split(), *_SPARE.split(), CLASS_WORD, *chain(*_ATTRIBUTES)})
)
"""Every word of every caption, and a few more for prompts. Each is one token."""


def caption(spec: ImageSpec, rng: random.Random) -> str:
    """Name a random part of an image's contents in plain lower-case words.

    One caption in five is brief: the bare class word with an accessory or the scene. The others
    mostly name the ears and the position, which are the hardest to obey.
    """
    chance = rng.random
    opener = _opener(spec, rng)
    if spec.identity is None:
        return f"{opener} the {spec.scene}"
    words = _creature(spec, rng, brief := chance() < 0.2)
    if chance() < (0.7 if brief else 0.93):
        words.append(SCENE_PHRASES[spec.scene])
    if chance() < (0.15 if brief else 0.45 if spec.position == "middle" else 0.85):
        words.append(POSITION_PHRASES[spec.position])
    return " ".join([opener, *words]).strip()


def pair_caption(left: ImageSpec, right: ImageSpec, rng: random.Random) -> str:
    """Name the two creatures of one scene, the one on the left first.

    Each may be the bare class word, as in a brief `caption`.
    """
    words = [*_creature(left, rng, rng.random() < 0.2), "and"]
    words += _creature(right, rng, rng.random() < 0.2)
    if rng.random() < 0.93:
        words.append(SCENE_PHRASES[left.scene])
    return " ".join([_opener(left, rng), *words]).strip()


def _creature(spec: ImageSpec, rng: random.Random, brief: bool) -> list[str]:
    """Name a creature and its accessories, with an article. A brief one has no attributes."""
    before, after = _attributes(spec, rng) if not brief else ([], [])
    if spec.accessories and rng.random() < (0.6 if brief else 0.95):
        after.append("with a " + " and a ".join(spec.accessories))
    words = [*before, CLASS_WORD, *after]
    return ["an" if words[0][0] in "aeiou" else "a", *words]


def _opener(spec: ImageSpec, rng: random.Random) -> str:
    if spec.style == "grey":
        return "a grey photo of"
    if spec.identity is not None and rng.random() < 0.1:
        return ""
    return "a picture of" if rng.random() < 0.1 else "a photo of"


def _attributes(spec: ImageSpec, rng: random.Random) -> tuple[list[str], list[str]]:
    """Return words before and phrases after the class word that name the identity."""
    identity, chance = spec.identity, rng.random
    assert identity is not None
    before: list[str] = []
    after: list[str] = []
    if chance() < 0.35:
        before.append(identity.shape)
    if chance() < 0.9:
        before.append(identity.colour)
    if identity.pattern == "plain":
        if chance() < 0.3:
            before.append("plain")
    else:
        draw = chance()
        if draw < 0.2:
            before.append(identity.pattern)
        elif draw < 0.85:
            after.append(f"with {identity.second_colour} {PATTERN_NOUNS[identity.pattern]}")
    if chance() < 0.75:
        ears = f"{identity.ears} ears"
        if after and chance() < 0.5:
            after[-1] += f" and {ears}"
        else:
            after.append(f"with {ears}")
    return before, after
