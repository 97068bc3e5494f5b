"""Prompts of the tiny world's studies, so hard that the class word fails some."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TypeVar

from sefi_fast.evaluation.judge_scorer import AskedAttributes
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.tiny_world.captions import PATTERN_NOUNS, POSITION_PHRASES, SCENE_PHRASES
from sefi_fast.tiny_world.drawing import (
    ACCESSORIES,
    COLOURS,
    EARS,
    POSITIONS,
    SCENES,
    SHAPES,
    Identity,
    ImageSpec,
    held_out_identities,
)

_SINGLE = tuple((accessory,) for accessory in ACCESSORIES)
# A hat and a crown sit in the same place.
_ACCESSORIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "place": ((),),
    "together": _SINGLE,
    "pair": (
        ("hat", "ball"),
        ("crown", "scarf"),
        ("scarf", "ball"),
        ("hat", "scarf"),
        ("crown", "ball"),
    ),
    "attribute": _SINGLE,
    "rare": (("hat", "scarf", "ball"), ("crown", "scarf", "ball")),
    "markings": _SINGLE,
}
"""Kind of prompts → accessories that its prompts ask for, one after the other."""
KINDS = tuple(_ACCESSORIES)
"""Kinds of prompts, in the order in which they alternate. All name a scene, all but "markings" a
position. "attribute" asks for other ears or another shape than the identity's, "rare" for three
accessories, which no training image of the bundled model shows together, and "markings" for
stripes or spots of another color than the identity's."""

T = TypeVar("T")


@dataclass(frozen=True)
class StudyPrompt(AskedAttributes):
    """A prompt and the attributes that an image must show to obey it.

    Attributes:
        kind: one of KINDS, or "open" for a prompt without a scene.
        tail: the words after the subject.
    """

    kind: str = "open"
    tail: str = ""

    @property
    def text(self) -> str:
        """Return the prompt, {} in place of the subject."""
        shape = f"{self.change['shape']} " if "shape" in self.change else ""
        after = ""
        if "ears" in self.change:
            after = f"with {self.change['ears']} ears "
        if "pattern" in self.change:
            noun = PATTERN_NOUNS[self.change["pattern"]]
            after = f"with {self.change['second_colour']} {noun} "
        return f"a photo of a {shape}{{}} {after}{self.tail}".rstrip()

    def spelled_out(self, identity: Identity) -> str:
        """Return the prompt with the identity in words, as in the model's captions."""
        seen = replace(identity, **self.change)
        return f"a photo of a {identity_words(seen)} {self.tail}".rstrip()


@dataclass(frozen=True)
class StudySubject:
    """An identity to train, its one image, and its prompts.

    Attributes:
        number: number of the subject in the study.
        image: contents of the image; its identity is held out from the bundled model.
        prompts: prompts in other scenes than the image's.
    """

    number: int
    image: ImageSpec
    prompts: tuple[StudyPrompt, ...]

    @property
    def identity(self) -> Identity:
        """Return the identity that the image shows."""
        assert self.image.identity is not None
        return self.image.identity

    @property
    def open_prompts(self) -> tuple[StudyPrompt, ...]:
        """Return prompts without a scene: bare, with an accessory, with a position.

        The scenes of their images show whether a subject was trained on its image's scene too.
        """
        accessory = _pick(ACCESSORIES, self.number)
        position = _pick([p for p in POSITIONS if p != self.image.position], self.number)
        asked = {"creature": "yes"}
        return (
            StudyPrompt(asked),
            StudyPrompt(asked | {accessory: "yes"}, tail=f"with a {accessory}"),
            StudyPrompt(asked | {"position": position}, tail=POSITION_PHRASES[position]),
        )

    @property
    def scene(self) -> str:
        """Return the scene of the image in words, for `TrainConfig.scene`."""
        return SCENE_PHRASES[self.image.scene]

    @property
    def place(self) -> str:
        """Return the position of the creature in words."""
        return POSITION_PHRASES[self.image.position]


def identity_words(identity: Identity) -> str:
    """Return an identity in words: 'round red creature with blue spots and big ears'."""
    if identity.second_colour is None:
        coat = f"{identity.colour} plain {CLASS_WORD} with"
    else:
        noun = PATTERN_NOUNS[identity.pattern]
        coat = f"{identity.colour} {CLASS_WORD} with {identity.second_colour} {noun} and"
    return f"{identity.shape} {coat} {identity.ears} ears"


def study_subjects(count: int, prompts: int, seed: int = 0) -> list[StudySubject]:
    """Return held-out identities in a fixed random order, each with one image and prompts.

    A larger `count` or `prompts` begins with the same ones.

    Args:
        count: number of identities, at most 66.
        prompts: number of prompts for each.
        seed: seed of every choice.

    Raises:
        ValueError: a number is out of range.
    """
    held_out = held_out_identities()
    if not 1 <= count <= len(held_out):
        raise ValueError(f"identities must be 1 to {len(held_out)}, the held-out ones; got {count}")
    if prompts < 1:
        raise ValueError(f"prompts must be at least 1, got {prompts}")
    random.Random(seed).shuffle(held_out)
    subjects = []
    for number, identity in enumerate(held_out[:count]):
        rng = random.Random(f"{seed}/{number}")
        image = ImageSpec(
            identity,
            SCENES[number % len(SCENES)],
            position=rng.choice(POSITIONS),
            mirrored=rng.random() < 0.5,
            shift=(rng.uniform(-4, 4), rng.uniform(-4, 4)),
        )
        subjects.append(StudySubject(number, image, _prompts(image, prompts, rng)))
    return subjects


def _prompts(image: ImageSpec, count: int, rng: random.Random) -> tuple[StudyPrompt, ...]:
    assert image.identity is not None
    others = [scene for scene in SCENES if scene != image.scene]
    rng.shuffle(others)
    turns = {kind: rng.randrange(60) for kind in KINDS}
    prompts = []
    for kind, scene in islice(zip(cycle(KINDS), cycle(others)), count):
        turn = turns[kind]
        turns[kind] += 1
        accessories = _pick(_ACCESSORIES[kind], turn)
        change = _change(kind, image.identity, turn)
        wanted = {"creature": "yes", "scene": scene} | dict.fromkeys(accessories, "yes") | change
        parts = ["with a " + " and a ".join(accessories)] if accessories else []
        parts.append(SCENE_PHRASES[scene])
        if kind != "markings":
            position = _pick([p for p in POSITIONS if p != image.position], turn)
            parts.append(POSITION_PHRASES[position])
            wanted["position"] = position
        prompts.append(StudyPrompt(wanted, change, kind, " ".join(parts)))
    return tuple(prompts)


def _change(kind: str, identity: Identity, turn: int) -> dict[str, str]:
    """Return the attributes of the identity that a prompt of this kind overrides."""
    if kind == "attribute":
        name, values = (("ears", EARS), ("shape", SHAPES))[turn % 2]
        others = [value for value in values if value != getattr(identity, name)]
        return {name: _pick(others, turn // 2)}
    if kind == "markings":
        colours = [c for c in COLOURS if c not in (identity.colour, identity.second_colour)]
        pattern = _pick(tuple(PATTERN_NOUNS), turn)
        return {"pattern": pattern, "second_colour": _pick(colours, turn // 2)}
    return {}


def _pick(values: Sequence[T], turn: int) -> T:
    return values[turn % len(values)]
