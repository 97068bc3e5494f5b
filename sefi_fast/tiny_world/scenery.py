"""The scenes of the drawn world, and the canvas that everything is drawn on."""

from __future__ import annotations

from PIL import ImageDraw

CANVAS = 192
"""Side in pixels of the canvas on which a picture is drawn before it is reduced."""

Box = tuple[tuple[float, float], tuple[float, float]]


def box(x0: float, y0: float, x1: float, y1: float) -> Box:
    """A box from its upper left to its lower right corner, in canvas pixels."""
    return (x0, y0), (x1, y1)


def oval(x: float, y: float, half_width: float, half_height: float) -> Box:
    """The box around an ellipse."""
    return box(x - half_width, y - half_height, x + half_width, y + half_height)


def draw_scene(pen: ImageDraw.ImageDraw, scene: str, mirrored: bool, width: int = CANVAS) -> None:
    """Fill the canvas with a scene.

    Args:
        pen: of the canvas.
        scene: which.
        mirrored: its sun, moon or cactus is on the left.
        width: of the canvas, a multiple of CANVAS; trees, houses and stars repeat.
    """
    side, right = CANVAS, width
    starts = range(0, width, CANVAS)

    def fill(x0: float, y0: float, x1: float, y1: float, colour: tuple[int, int, int]) -> None:
        pen.rectangle(box(x0, y0, x1, y1), fill=colour)

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
