"""Draw the creatures and scenes of the tiny world."""

from __future__ import annotations

import colorsys
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw

CANVAS = 192
"""Side in pixels of the canvas on which an image is drawn before it is reduced."""
IMAGE_SIZE = 48
"""Side in pixels of the bundled model's images."""

_HSV = {
    "red": (0.99, 0.88, 0.85),
    "orange": (0.075, 0.95, 0.98),
    "yellow": (0.145, 0.85, 0.98),
    "green": (0.29, 0.80, 0.80),
    "blue": (0.61, 0.85, 0.90),
    "purple": (0.76, 0.70, 0.62),
    "pink": (0.91, 0.45, 1.00),
    "white": (0.10, 0.02, 0.98),
}
COLOURS = tuple(_HSV)
PATTERNS = ("plain", "striped", "spotted")
EARS = ("pointy", "big", "long")
SHAPES = ("round", "tall")
SCENES = ("beach", "forest", "snow", "desert", "city", "night")
ACCESSORIES = ("hat", "crown", "scarf", "ball")
POSITIONS = ("left", "middle", "right")
STYLES = ("colour", "grey")

# Share of random images without a creature.
_EMPTY_SHARE = 0.02
_OUTLINE = (25, 20, 30)
_OUTLINE_WIDTH = 5
_CENTRES = {"left": 0.28, "middle": 0.5, "right": 0.72}


def _check_values(spec: Identity | ImageSpec, **allowed: tuple[str | None, ...]) -> None:
    for name, values in allowed.items():
        if getattr(spec, name) not in values:
            raise ValueError(f"{name} is {getattr(spec, name)!r}. It must be one of {values}.")


@dataclass(frozen=True)
class Identity:
    """Attributes by which a creature is recognised in any scene.

    Attributes:
        colour: body colour, one of COLOURS.
        second_colour: colour of the pattern; None exactly when the pattern is "plain".
        pattern: one of PATTERNS.
        ears: one of EARS.
        shape: one of SHAPES.
    """

    colour: str
    second_colour: str | None
    pattern: str
    ears: str
    shape: str

    def __post_init__(self) -> None:
        _check_values(
            self, colour=COLOURS, second_colour=(None, *COLOURS), pattern=PATTERNS, ears=EARS,
            shape=SHAPES,
        )  # fmt: skip
        if (self.pattern == "plain") != (self.second_colour is None):
            raise ValueError(
                f"A {self.pattern} creature has second_colour={self.second_colour!r}. "
                "None is for the plain pattern, and only for it."
            )
        if self.colour == self.second_colour:
            raise ValueError(f"Both colours are {self.colour!r}. They must differ.")

    def value(self, attribute: str) -> str:
        """Return an attribute as the judge names it: "none" for a missing second colour."""
        return getattr(self, attribute) or "none"

    @property
    def held_out(self) -> bool:
        """Whether no training image of the generator shows it: one patterned one in twelve."""
        if self.second_colour is None:
            return False
        return (
            COLOURS.index(self.colour) * 7
            + COLOURS.index(self.second_colour) * 5
            + PATTERNS.index(self.pattern) * 3
            + EARS.index(self.ears) * 2
            + SHAPES.index(self.shape) * 11
        ) % 12 == 0


SUBJECT_IDENTITY = Identity("purple", "orange", "spotted", "big", "round")
"""The creature of the bundled image. It is held out: no training image of the model shows it."""


@dataclass(frozen=True)
class ImageSpec:
    """Contents of one drawn image.

    Attributes:
        identity: the creature; None for an empty scene.
        scene: one of SCENES.
        accessories: any of ACCESSORIES, each once.
        position: one of POSITIONS.
        style: "colour", or "grey" for a desaturated image.
        mirrored: whether the scene's sun, moon or cactus is on the left.
        shift: small offset of the creature from its position, in canvas pixels (x, y).
    """

    identity: Identity | None
    scene: str
    accessories: tuple[str, ...] = ()
    position: str = "middle"
    style: str = "colour"
    mirrored: bool = False
    shift: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        _check_values(self, scene=SCENES, position=POSITIONS, style=STYLES)
        known = set(ACCESSORIES) & set(self.accessories)
        if len(known) != len(self.accessories):
            raise ValueError(
                f"accessories are {self.accessories}. They must be any of {ACCESSORIES}, each once."
            )


def identities() -> Iterator[Identity]:
    """Yield all identities in a fixed order."""
    for colour, pattern, ears, shape in product(COLOURS, PATTERNS, EARS, SHAPES):
        for second in (None,) if pattern == "plain" else COLOURS:
            if second != colour:
                yield Identity(colour, second, pattern, ears, shape)


def held_out_identities() -> list[Identity]:
    """Return the identities that no training image of the generator shows."""
    return [identity for identity in identities() if identity.held_out]


def random_identity(rng: random.Random) -> Identity:
    """Return an identity that is not held out; each pattern is equally likely."""
    while True:
        colour, pattern = rng.choice(COLOURS), rng.choice(PATTERNS)
        second = rng.choice([c for c in COLOURS if c != colour]) if pattern != "plain" else None
        identity = Identity(colour, second, pattern, rng.choice(EARS), rng.choice(SHAPES))
        if not identity.held_out:
            return identity


def random_spec(
    rng: random.Random,
    identity: Identity | None = None,
    *,
    grey_share: float = 0.06,
) -> ImageSpec:
    """Return a random image spec.

    Args:
        rng: source of every choice.
        identity: the creature. None chooses one that is not held out, or at times no creature.
        grey_share: share of desaturated images.
    """
    scene, position = rng.choice(SCENES), rng.choice(POSITIONS)
    style = "grey" if rng.random() < grey_share else "colour"
    mirrored, shift = rng.random() < 0.5, (rng.uniform(-4, 4), rng.uniform(-4, 4))
    if identity is None:
        if rng.random() < _EMPTY_SHARE:
            return ImageSpec(None, scene, style=style, mirrored=mirrored)
        identity = random_identity(rng)
    accessories: tuple[str, ...] = ()
    if rng.random() < 0.6:
        accessories = (first := rng.choice(ACCESSORIES),)
        if rng.random() < 0.2:
            # A hat and a crown sit in the same place.
            others = [a for a in ACCESSORIES if a != first and {a, first} != {"hat", "crown"}]
            accessories = (first, rng.choice(others))
    return ImageSpec(identity, scene, accessories, position, style, mirrored, shift)


def random_specs(count: int, seed: int) -> list[ImageSpec]:
    """Return `count` random image specs, the same for the same seed."""
    rng = random.Random(seed)
    return [random_spec(rng) for _ in range(count)]


Box = tuple[tuple[float, float], tuple[float, float]]


def box(x0: float, y0: float, x1: float, y1: float) -> Box:
    """Return a box from its upper left to its lower right corner, in canvas pixels."""
    return (x0, y0), (x1, y1)


def oval(x: float, y: float, half_width: float, half_height: float) -> Box:
    """Return the box around an ellipse."""
    return box(x - half_width, y - half_height, x + half_width, y + half_height)


def color_rgb(name: str) -> tuple[int, int, int]:
    """Return the RGB value, 0..255, of one of COLOURS."""
    red, green, blue = colorsys.hsv_to_rgb(*_HSV[name])
    return int(255 * red), int(255 * green), int(255 * blue)


def draw(spec: ImageSpec, size: int = IMAGE_SIZE) -> tuple[Image.Image, Image.Image]:
    """Draw an image.

    Args:
        spec: its contents.
        size: side in pixels, a divisor of CANVAS.

    Returns:
        The image (RGB) and the creature's mask (L, 255 inside; accessories do not count).

    Raises:
        ValueError: the size does not divide CANVAS.
    """
    if size < 1 or CANVAS % size:
        raise ValueError(f"size is {size}. It must divide {CANVAS}, as {IMAGE_SIZE} does.")
    factor = CANVAS // size
    image = Image.new("RGB", (CANVAS, CANVAS))
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    draw_scene(ImageDraw.Draw(image), spec.scene, spec.mirrored)
    draw_creature(image, mask, spec)
    if spec.style == "grey":
        image = image.convert("L").convert("RGB")
    return image.reduce(factor), mask.reduce(factor)


def draw_scene(pen: ImageDraw.ImageDraw, scene: str, mirrored: bool, width: int = CANVAS) -> None:
    """Fill the canvas with a scene.

    Args:
        pen: pen of the canvas.
        scene: one of SCENES.
        mirrored: whether the sun, moon or cactus is on the left.
        width: width of the canvas, a multiple of CANVAS; trees, houses and stars repeat.
    """
    side, right = CANVAS, width
    starts = range(0, width, CANVAS)

    def fill(x0: float, y0: float, x1: float, y1: float, color: tuple[int, int, int]) -> None:
        pen.rectangle(box(x0, y0, x1, y1), fill=color)

    horizon = int(side * 0.55)
    x_side = 0.13 * side if mirrored else right - 0.13 * side
    if scene == "beach":
        fill(0, 0, right, side, (150, 215, 250))
        fill(0, side * 0.4, right, horizon + 8, (35, 120, 200))
        fill(0, horizon + 8, right, side, (240, 215, 150))
        pen.ellipse(box(x_side - 17, 10, x_side + 17, 44), fill=(255, 240, 110))
    elif scene == "forest":
        fill(0, 0, right, side, (175, 215, 190))
        fill(0, horizon + 12, right, side, (70, 110, 55))
        for k, x in enumerate(s + x for s in starts for x in (16, 56, 96, 136, 176)):
            height = 88 if k % 5 % 2 else 104
            fill(x - 5, horizon - 16, x + 5, horizon + 14, (95, 65, 35))
            tip, hem = (x, horizon + 14 - height), horizon - 8
            pen.polygon([tip, (x - 22, hem), (x + 22, hem)], fill=(20, 80, 40))
    elif scene == "snow":
        fill(0, 0, right, side, (150, 175, 215))
        fill(0, horizon, right, side, (225, 235, 250))
        high = (20, 20), (60, 40), (100, 16), (140, 44), (176, 22)
        low = (36, 76), (84, 80), (128, 84), (170, 78)
        for x, y in ((s + x, y) for s in starts for x, y in (*high, *low)):
            pen.ellipse(oval(x, y, 6, 6), fill=(255, 255, 255))
    elif scene == "desert":
        fill(0, 0, right, side, (253, 205, 150))
        fill(0, horizon, right, side, (205, 140, 75))
        middle, foot, cactus = x_side, horizon + 16, (45, 110, 60)
        fill(middle - 8, foot - 66, middle + 8, foot, cactus)
        fill(middle - 24, foot - 50, middle - 15, foot - 24, cactus)
        fill(middle - 24, foot - 32, middle, foot - 23, cactus)
        fill(middle + 15, foot - 56, middle + 24, foot - 32, cactus)
        fill(middle, foot - 40, middle + 24, foot - 31, cactus)
    elif scene == "city":
        fill(0, 0, right, side, (200, 215, 225))
        houses = (0, 80), (40, 110), (80, 70), (116, 100), (154, 84)
        for k, (left, height) in enumerate((s + x, h) for s in starts for x, h in houses):
            roof, walls = horizon + 12 - height, ((105, 100, 120), (125, 115, 125))
            fill(left, roof, left + 36, horizon + 12, walls[k % 5 % 2])
            for y in range(roof + 8, horizon - 4, 22):
                for x in (left + 6, left + 21):
                    fill(x, y, x + 9, y + 10, (250, 230, 130))
        fill(0, horizon + 12, right, side, (80, 80, 88))
    else:
        fill(0, 0, right, side, (18, 20, 62))
        fill(0, horizon + 10, right, side, (22, 48, 52))
        stars = (70, 18), (110, 36), (40, 66), (96, 72), (150, 70), (128, 14), (60, 44)
        for x, y in ((s + x, y) for s in starts for x, y in stars):
            pen.ellipse(oval(x, y, 4, 4), fill=(255, 255, 220))
        pen.ellipse(box(x_side - 20, 10, x_side + 20, 50), fill=(245, 240, 200))
        pen.ellipse(box(x_side - 8, 6, x_side + 26, 42), fill=(18, 20, 62))


def draw_creature(
    image: Image.Image, mask: Image.Image, spec: ImageSpec, left: float = 0.0
) -> None:
    """Draw the creature of an image, if there is one, and its accessories onto a canvas.

    Args:
        image: the canvas, RGB.
        mask: canvas of the same size, L; the creature's pixels become 255.
        spec: contents of the image.
        left: left edge of the image on the canvas.
    """
    if spec.identity is None:
        return
    centre = left + _CENTRES[spec.position] * CANVAS + spec.shift[0]
    ground = 0.89 * CANVAS + spec.shift[1]
    _draw_body(image, mask, spec.identity, centre, ground)
    _draw_accessories(ImageDraw.Draw(image), spec, centre, ground)


def _body(identity: Identity, ground: float) -> tuple[float, float, float, float]:
    """Return half width, half height, middle and top of the body."""
    half_width, half_height = (44.0, 40.0) if identity.shape == "round" else (31.0, 50.0)
    return half_width, half_height, ground - half_height, ground - 2 * half_height


def _draw_body(
    image: Image.Image, mask: Image.Image, identity: Identity, centre: float, ground: float
) -> None:
    pen, mask_pen = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    half_width, half_height, middle, top = _body(identity, ground)
    body_color = color_rgb(identity.colour)

    def part(x: float, y: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        pen.ellipse(oval(x, y, rx, ry), fill=fill)
        mask_pen.ellipse(oval(x, y, rx, ry), fill=255)

    for side in (-1, 1):
        part(centre + side * half_width * 0.5, ground + 1, 14, 9, _OUTLINE)
    for side in (-1, 1):
        if identity.ears == "pointy":
            x = centre + side * half_width * 0.62
            outer = [(x - 24, top + 34), (x + side * 14, top - 36), (x + 24, top + 34)]
            pen.polygon(outer, fill=_OUTLINE)
            mask_pen.polygon(outer, fill=255)
            inner = [(x - 15, top + 30), (x + side * 11, top - 20), (x + 15, top + 30)]
            pen.polygon(inner, fill=body_color)
        elif identity.ears == "big":
            x = centre + side * (half_width * 0.5 + 22)
            part(x, top + 6, 27, 27, _OUTLINE)
            part(x, top + 6, 22, 22, body_color)
        else:
            x = centre + side * half_width * 0.46
            part(x, top - 14, 15, 44, _OUTLINE)
            part(x, top - 14, 10, 39, body_color)
    part(centre, middle, half_width + _OUTLINE_WIDTH, half_height + _OUTLINE_WIDTH, _OUTLINE)

    coat = Image.new("RGB", image.size, body_color)
    if identity.second_colour is not None:
        coat_pen, second = ImageDraw.Draw(coat), color_rgb(identity.second_colour)
        if identity.pattern == "striped":
            for y in (top + 8, middle + 8, middle + 34):
                coat_pen.rectangle(box(0, y, image.width, y + 12), fill=second)
        else:
            for u, v in ((0, -0.78), (-0.66, 0.25), (0.66, 0.25), (0, 0.75)):
                spot = oval(centre + u * half_width, middle + v * half_height, 11, 11)
                coat_pen.ellipse(spot, fill=second)
    inside = Image.new("L", image.size, 0)
    ImageDraw.Draw(inside).ellipse(oval(centre, middle, half_width, half_height), fill=255)
    image.paste(coat, (0, 0), inside)

    eyes = middle - half_height * 0.2
    for side in (-1, 1):
        x = centre + side * half_width * 0.42
        pen.ellipse(oval(x, eyes, 13, 13), fill=_OUTLINE)
        pen.ellipse(oval(x, eyes, 11, 11), fill=(255, 255, 255))
        pen.ellipse(oval(x, eyes + 1, 6, 6), fill=(0, 0, 0))
    pen.chord(oval(centre, middle + half_height * 0.22, 13, 11), 0, 180, fill=(90, 10, 20))


def _draw_accessories(
    pen: ImageDraw.ImageDraw, spec: ImageSpec, centre: float, ground: float
) -> None:
    assert spec.identity is not None
    half_width, half_height, middle, top = _body(spec.identity, ground)
    if "scarf" in spec.accessories:
        y, red = middle + half_height * 0.52, (215, 25, 45)
        left, right = centre - half_width * 0.98, centre + half_width * 0.98
        pen.rounded_rectangle(box(left, y - 8, right, y + 10), 7, fill=red)
        x = centre + half_width * 0.3
        pen.rectangle(box(x, y + 6, x + 18, y + 34), fill=red)
    if "hat" in spec.accessories:
        y, felt = top + 10, (25, 25, 35)
        pen.rectangle(box(centre - 21, y - 40, centre + 21, y), fill=felt)
        pen.rectangle(box(centre - 21, y - 16, centre + 21, y - 5), fill=(215, 40, 50))
        pen.rounded_rectangle(box(centre - 34, y - 5, centre + 34, y + 6), 5, fill=felt)
    if "crown" in spec.accessories:
        y, tips = top + 12, ((-32, -36), (-14, -18), (0, -42), (14, -18), (32, -36))
        points = [(centre - 27, y), *((centre + u, y + v) for u, v in tips), (centre + 27, y)]
        pen.polygon(points, fill=(255, 205, 30), outline=(150, 100, 0))
    if "ball" in spec.accessories:
        # The position decides the side: a model that has to guess it draws two balls.
        x = centre + (-1 if spec.position == "right" else 1) * (half_width + 30)
        y = ground - 14
        pen.ellipse(oval(x, y, 23, 23), fill=_OUTLINE)
        pen.pieslice(oval(x, y, 19, 19), 0, 180, fill=(235, 50, 50))
        pen.pieslice(oval(x, y, 19, 19), 180, 360, fill=(255, 255, 255))
