"""Images of two creatures: double width, one creature in each half."""

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
)

HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
"""Boxes of the left and the right half, for `sefi_fast.regions`."""

# Largest distance in canvas pixels of a creature from the middle of its half.
_LARGEST_SHIFT = 14.0


@dataclass(frozen=True)
class PairSpec:
    """Contents of an image of two creatures.

    Attributes:
        left: left half, with the scene of the whole image.
        right: right half, in the same scene.
        mirrored: whether the scene's sun, moon or cactus is on the left.
    """

    left: ImageSpec
    right: ImageSpec
    mirrored: bool = False


def random_pair(rng: random.Random) -> PairSpec:
    """Return two random creatures that are not held out, each near the middle of its half."""
    left, right = (random_spec(rng, random_identity(rng), grey_share=0.0) for _ in range(2))
    right = replace(right, scene=left.scene)
    return PairSpec(_placed(left, rng), _placed(right, rng), mirrored=rng.random() < 0.5)


def _placed(half: ImageSpec, rng: random.Random) -> ImageSpec:
    shift = rng.uniform(-_LARGEST_SHIFT, _LARGEST_SHIFT), rng.uniform(-4, 4)
    return replace(half, position="middle", shift=shift)


def draw_pair(spec: PairSpec) -> Image.Image:
    """Draw an image of two creatures, 96×48 pixels (RGB)."""
    image, mask = (Image.new(mode, (2 * CANVAS, CANVAS)) for mode in ("RGB", "L"))
    draw_scene(ImageDraw.Draw(image), spec.left.scene, spec.mirrored, image.width)
    draw_creature(image, mask, spec.left)
    draw_creature(image, mask, spec.right, CANVAS)
    return image.reduce(CANVAS // IMAGE_SIZE)


def halves_of(image: Image.Image) -> list[Image.Image]:
    """Return the left and the right half of an image twice as wide as high."""
    side = image.height
    return [image.crop((left, 0, left + side, side)) for left in (0, side)]
