"""The drawn world: the same seed draws the same image, masks fit, identities are held out."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from evals.tiny_world.pairs import PairSpec, draw_pair, halves_of
from sefi_fast.tiny_world import SUBJECT_SCENE, bundled_subject_image
from sefi_fast.tiny_world.drawing import (
    ACCESSORIES,
    COLOURS,
    EARS,
    PATTERNS,
    POSITIONS,
    SCENES,
    SHAPES,
    SUBJECT_IDENTITY,
    Identity,
    ImageSpec,
    color_rgb,
    draw,
    held_out_identities,
    identities,
    random_specs,
)

PLAIN = replace(SUBJECT_IDENTITY, pattern="plain", second_colour=None)
SNOW = ImageSpec(SUBJECT_IDENTITY, "snow")


def pixels(spec: ImageSpec, size: int = 48) -> np.ndarray:
    return np.asarray(draw(spec, size)[0]).astype(int)


def test_the_same_seed_draws_the_same_images():
    first, again, other = (random_specs(20, seed) for seed in (3, 3, 4))
    assert first == again != other
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "variants",
    [
        [replace(SNOW, identity=replace(PLAIN, colour=value)) for value in COLOURS],
        [replace(SNOW, identity=replace(SUBJECT_IDENTITY, ears=value)) for value in EARS],
        [replace(SNOW, identity=replace(SUBJECT_IDENTITY, shape=value)) for value in SHAPES],
        [
            *(replace(SNOW, identity=one) for one in (PLAIN, replace(PLAIN, pattern="striped",
                                                                     second_colour="red"))),
            *(replace(SNOW, scene=scene) for scene in SCENES),
            *(replace(SNOW, accessories=(accessory,)) for accessory in ACCESSORIES),
            *(replace(SNOW, position=position) for position in ("left", "right")),
        ],
    ],
)  # fmt: skip
def test_every_value_of_an_attribute_shows(variants):
    for one, other in combinations(map(pixels, variants), 2):
        assert (np.abs(one - other).sum(-1) > 60).mean() > 0.01


def test_the_mask_covers_the_creature_alone_and_follows_its_position():
    spec = ImageSpec(SUBJECT_IDENTITY, "city", position="left")
    image, mask = pixels(spec, 192), np.asarray(draw(spec, 192)[1]) > 0
    changed = (image != pixels(replace(spec, identity=None), 192)).any(-1)
    assert not (changed & ~mask).any() and changed[mask].mean() > 0.98
    body = (image == color_rgb("purple")).all(-1)
    assert body.sum() > 2000 and mask[body].all()
    masks = [np.asarray(draw(replace(spec, position=p))[1]) > 127 for p in POSITIONS]
    left, middle, right = (np.nonzero(one)[1].mean() for one in masks)
    assert left < 18 < 22 < middle < 26 < 30 < right
    assert not np.asarray(draw(ImageSpec(None, "forest"))[1]).any()


def test_a_grey_image_has_no_color():
    grey = pixels(ImageSpec(SUBJECT_IDENTITY, "beach", style="grey"))
    assert (grey.max(-1) == grey.min(-1)).all()


def test_exchanged_creatures_exchange_the_halves_of_a_pair():
    other = replace(SNOW, identity=PLAIN, accessories=("hat",))
    first, second = draw_pair(PairSpec(SNOW, other)), draw_pair(PairSpec(other, SNOW))
    assert first.size == (96, 48)
    halves, exchanged = (list(map(np.asarray, halves_of(one))) for one in (first, second))
    assert np.array_equal(halves[0], exchanged[1]) and np.array_equal(halves[1], exchanged[0])


def test_held_out_identities_are_a_twelfth_and_never_drawn_for_training():
    everyone, held_out = list(identities()), held_out_identities()
    assert len(set(everyone)) == len(everyone) == 720
    patterned = sum(one.pattern != "plain" for one in everyone)
    assert patterned / 14 < len(held_out) < patterned / 9
    every_value = {"colour": COLOURS, "second_colour": COLOURS, "pattern": PATTERNS[1:],
                   "ears": EARS, "shape": SHAPES}  # fmt: skip
    for name, values in every_value.items():
        assert {getattr(one, name) for one in held_out} == set(values)
    specs = random_specs(4000, 0)
    assert not any({"hat", "crown"} <= set(spec.accessories) for spec in specs)
    drawn = {spec.identity for spec in specs}
    assert len(drawn) > 550 and not drawn & set(held_out)


def test_the_bundled_image_is_a_held_out_identity_as_drawn():
    assert SUBJECT_IDENTITY.held_out
    with Image.open(bundled_subject_image()) as bundled:
        spec = ImageSpec(SUBJECT_IDENTITY, SUBJECT_SCENE, mirrored=True)
        assert np.array_equal(np.asarray(bundled.convert("RGB")), np.asarray(draw(spec, 192)[0]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Identity("teal", None, "plain", "big", "tall"), "colour is 'teal'"),
        (lambda: Identity("red", None, "spotted", "big", "tall"), "None is for the plain"),
        (lambda: Identity("red", "blue", "plain", "big", "tall"), "None is for the plain"),
        (lambda: Identity("red", "red", "striped", "big", "tall"), "must differ"),
        (lambda: Identity("red", "blue", "striped", "floppy", "tall"), "ears is 'floppy'"),
        (lambda: ImageSpec(PLAIN, "moon"), "scene is 'moon'"),
        (lambda: ImageSpec(PLAIN, "snow", ("sword",)), "accessories"),
        (lambda: ImageSpec(PLAIN, "snow", ("hat", "hat")), "accessories"),
        (lambda: draw(SNOW, 50), "must divide 192"),
    ],
)
def test_impossible_creatures_and_images_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
