"""Two creatures side by side: pictures of double width, one creature in each half."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from sefi_fast.tiny_world.drawing import (
    CANVAS,
    IMAGE_SIZE,
    ImageSpec,
    draw_creature,
    draw_scene,
    random_identity,
    random_spec,
    reduction,
)

HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
"""The boxes of the left and the right half, for `sefi_fast.regions`."""

# Pixels of the canvas that a creature stands off the middle of its half, at most.
_WANDER = 14.0


@dataclass(frozen=True)
class PairSpec:
    """All that is drawn in a picture of two creatures.

    Attributes:
        left: the creature of the left half, with the scene of the whole picture.
        right: that of the right half, in the same scene.
        mirrored: which side the scene's sun, moon or cactus is on.
    """

    left: ImageSpec
    right: ImageSpec
    mirrored: bool = False

    def __post_init__(self) -> None:
        if self.left.scene != self.right.scene:
            raise ValueError(
                f"one picture has one scene, not {self.left.scene!r} and {self.right.scene!r}"
            )
        if self.left.identity is None or self.right.identity is None:
            raise ValueError("a pair has a creature in each half; one has none")


def random_pair(rng: random.Random) -> PairSpec:
    """Two random creatures that are not held out, each about the middle of its half."""
    left, right = (random_spec(rng, random_identity(rng), grey_share=0.0) for _ in range(2))
    right = replace(right, scene=left.scene)
    return PairSpec(_placed(left, rng), _placed(right, rng), mirrored=rng.random() < 0.5)


def _placed(half: ImageSpec, rng: random.Random) -> ImageSpec:
    shift = rng.uniform(-_WANDER, _WANDER), rng.uniform(-4, 4)
    return replace(half, position="middle", shift=shift)


def draw_pair(spec: PairSpec, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw a picture of two creatures, 2·size pixels wide and size high (RGB).

    Args:
        spec: what to draw.
        size: a divisor of CANVAS.
    """
    factor = reduction(size)
    picture, mask = (Image.new(mode, (2 * CANVAS, CANVAS)) for mode in ("RGB", "L"))
    draw_scene(ImageDraw.Draw(picture), spec.left.scene, spec.mirrored, picture.width)
    draw_creature(picture, mask, spec.left)
    draw_creature(picture, mask, spec.right, CANVAS)
    return picture.reduce(factor)


def halves_of(picture: Image.Image) -> list[Image.Image]:
    """The left and the right half of a picture twice as wide as high."""
    side = picture.height
    return [picture.crop((left, 0, left + side, side)) for left in (0, side)]
