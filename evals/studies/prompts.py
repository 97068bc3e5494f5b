"""Prompts of the tiny world's studies: hard enough that the plain class word fails some."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TypeVar

from sefi_fast.evaluation.scorers import AskedAttributes
from sefi_fast.tiny_world.captions import (
    CLASS_WORD,
    PATTERN_NOUNS,
    POSITION_PHRASES,
    SCENE_PHRASES,
)
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

KINDS = ("place", "together", "pair", "attribute", "rare", "markings")
"""Kinds of prompts, in the order in which a list of prompts goes round them.

place: a position in a scene. together: an accessory as well. pair: two accessories, scene and
position. attribute: other ears or another shape than the identity's, with accessory, scene and
position. rare: three accessories, which no training picture of the bundled model has together,
scene and position. markings: stripes or spots of another colour than the identity's, with accessory
and scene.
"""


_SINGLE = tuple((accessory,) for accessory in ACCESSORIES)
_ACCESSORIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "together": _SINGLE,
    "attribute": _SINGLE,
    "markings": _SINGLE,
    "pair": (
        ("hat", "ball"),
        ("crown", "scarf"),
        ("scarf", "ball"),
        ("hat", "scarf"),
        ("crown", "ball"),
    ),
    "rare": (("hat", "scarf", "ball"), ("crown", "scarf", "ball")),
}
"""Accessories that a kind asks for, in turn. A hat and a crown sit in the same place."""

T = TypeVar("T")


@dataclass(frozen=True)
class StudyPrompt(AskedAttributes):
    """A prompt and what a picture must show to obey it.

    Attributes:
        kind: one of KINDS.
        tail: the words after the subject.
    """

    kind: str = "open"
    tail: str = ""

    @property
    def text(self) -> str:
        """The prompt, {} where the subject stands."""
        shape = f"{self.change['shape']} " if "shape" in self.change else ""
        after = ""
        if "ears" in self.change:
            after = f"with {self.change['ears']} ears "
        if "pattern" in self.change:
            noun = PATTERN_NOUNS[self.change["pattern"]]
            after = f"with {self.change['second_colour']} {noun} "
        return f"a photo of a {shape}{{}} {after}{self.tail}".rstrip()

    def spelled_out(self, identity: Identity) -> str:
        """The prompt with the identity in words, as the model's captions would have it."""
        seen = replace(identity, **self.change)
        return f"a photo of a {identity_words(seen)} {self.tail}".rstrip()


@dataclass(frozen=True)
class StudySubject:
    """An identity to be learnt, its one picture, and the prompts it is tried on.

    Attributes:
        number: of the subject in the study.
        picture: what the picture shows; its identity is held out from the bundled model.
        prompts: in none of them is the scene that of the picture.
    """

    number: int
    picture: ImageSpec
    prompts: tuple[StudyPrompt, ...]

    @property
    def identity(self) -> Identity:
        """Whom the picture shows."""
        assert self.picture.identity is not None
        return self.picture.identity

    @property
    def open_prompts(self) -> tuple[StudyPrompt, ...]:
        """Prompts that leave the scene open: bare, with an accessory, with a position.

        What a subject puts there by itself shows whether it has learnt its picture's scene.
        """
        accessory = _pick(ACCESSORIES, self.number)
        position = _pick([p for p in POSITIONS if p != self.picture.position], self.number)
        asked = {"creature": "yes"}
        return (
            StudyPrompt(asked),
            StudyPrompt(asked | {accessory: "yes"}, tail=f"with a {accessory}"),
            StudyPrompt(asked | {"position": position}, tail=POSITION_PHRASES[position]),
        )

    @property
    def scene(self) -> str:
        """Where the picture was taken, in words, for `TrainConfig.scene`."""
        return SCENE_PHRASES[self.picture.scene]

    @property
    def place(self) -> str:
        """Where in the picture the creature stands, in words."""
        return POSITION_PHRASES[self.picture.position]


def identity_words(identity: Identity) -> str:
    """An identity in words: 'round red creature with blue spots and big ears'."""
    if identity.second_colour is None:
        coat = f"{identity.colour} plain {CLASS_WORD} with"
    else:
        noun = PATTERN_NOUNS[identity.pattern]
        coat = f"{identity.colour} {CLASS_WORD} with {identity.second_colour} {noun} and"
    return f"{identity.shape} {coat} {identity.ears} ears"


def study_subjects(count: int, prompts: int, seed: int = 0) -> list[StudySubject]:
    """Held-out identities in a fixed random order, each with one picture and prompts of its own.

    A larger `count` or `prompts` begins with the same ones.

    Args:
        count: number of identities, at most 66.
        prompts: number of prompts for each.
        seed: of every choice.

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
        picture = ImageSpec(
            identity,
            SCENES[number % len(SCENES)],
            position=rng.choice(POSITIONS),
            mirrored=rng.random() < 0.5,
            shift=(rng.uniform(-4, 4), rng.uniform(-4, 4)),
        )
        made = tuple(_prompts(picture, prompts, rng))
        subjects.append(StudySubject(number, picture, made))
    return subjects


def _prompts(picture: ImageSpec, count: int, rng: random.Random) -> list[StudyPrompt]:
    others = [scene for scene in SCENES if scene != picture.scene]
    rng.shuffle(others)
    scenes = cycle(others)
    turns = {kind: rng.randrange(60) for kind in KINDS}
    prompts = []
    for kind in islice(cycle(KINDS), count):
        prompts.append(_prompt(kind, turns[kind], next(scenes), picture))
        turns[kind] += 1
    return prompts


def _prompt(kind: str, turn: int, scene: str, picture: ImageSpec) -> StudyPrompt:
    assert picture.identity is not None
    accessories: tuple[str, ...] = ()
    if kind in _ACCESSORIES:
        accessories = _pick(_ACCESSORIES[kind], turn)
    position: str | None = None
    if kind != "markings":
        position = _pick([p for p in POSITIONS if p != picture.position], turn)
    change: dict[str, str] = {}
    if kind == "attribute":
        change = _other_attribute(picture.identity, turn)
    elif kind == "markings":
        change = _other_markings(picture.identity, turn)
    parts = ["with a " + " and a ".join(accessories)] if accessories else []
    parts.append(SCENE_PHRASES[scene])
    if position is not None:
        parts.append(POSITION_PHRASES[position])
    wanted = {"creature": "yes", "scene": scene} | dict.fromkeys(accessories, "yes") | change
    wanted |= {} if position is None else {"position": position}
    return StudyPrompt(wanted, change, kind, " ".join(parts))


def _other_attribute(identity: Identity, turn: int) -> dict[str, str]:
    name, values = (("ears", EARS), ("shape", SHAPES))[turn % 2]
    others = [value for value in values if value != getattr(identity, name)]
    return {name: _pick(others, turn // 2)}


def _other_markings(identity: Identity, turn: int) -> dict[str, str]:
    colours = [c for c in COLOURS if c not in (identity.colour, identity.second_colour)]
    return {
        "pattern": _pick(tuple(PATTERN_NOUNS), turn),
        "second_colour": _pick(colours, turn // 2),
    }


def _pick(values: Sequence[T], turn: int) -> T:
    return values[turn % len(values)]
