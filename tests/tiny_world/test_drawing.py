"""The drawn world: determinism, masks, held-out identities, and clear errors."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from sefi_fast.tiny_world import SUBJECT_IDENTITY, SUBJECT_SCENE, bundled_subject_image
from sefi_fast.tiny_world.drawing import (
    ACCESSORIES,
    COLOURS,
    EARS,
    PATTERNS,
    POSITIONS,
    SCENES,
    SHAPES,
    Identity,
    ImageSpec,
    colour_rgb,
    draw,
    held_out_identities,
    identities,
    random_spec,
    random_specs,
)

ANIMAL = Identity("purple", "orange", "spotted", "big", "round")


def pixels(spec: ImageSpec, size: int = 48) -> np.ndarray:
    return np.asarray(draw(spec, size)[0]).astype(int)


def test_the_same_seed_draws_the_same_pictures():
    first, again, other = (random_specs(20, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(pixels(a), pixels(b))


@pytest.mark.parametrize(
    ("field", "values"),
    [("colour", COLOURS), ("ears", EARS), ("shape", SHAPES)],
)
def test_every_value_of_an_identity_attribute_shows(field, values):
    drawn = [
        pixels(ImageSpec(replace(ANIMAL, **{field: v}), "snow"))
        for v in values
        if v != ANIMAL.second_colour
    ]
    for k, one in enumerate(drawn):
        for other in drawn[k + 1 :]:
            assert (np.abs(one - other).sum(-1) > 60).mean() > 0.02


def test_patterns_scenes_positions_and_accessories_show():
    plain = replace(ANIMAL, pattern="plain", second_colour=None)
    variants = [ImageSpec(plain, "snow"), ImageSpec(replace(ANIMAL, pattern="striped"), "snow")]
    variants += [ImageSpec(ANIMAL, scene) for scene in SCENES]
    variants += [ImageSpec(ANIMAL, "snow", (accessory,)) for accessory in ACCESSORIES]
    variants += [ImageSpec(ANIMAL, "snow", position=p) for p in POSITIONS if p != "middle"]
    drawn = [pixels(spec) for spec in variants]
    for k, one in enumerate(drawn):
        for other in drawn[k + 1 :]:
            assert (np.abs(one - other).sum(-1) > 60).mean() > 0.01


def test_the_mask_covers_the_creature_and_nothing_else():
    spec = ImageSpec(ANIMAL, "city", position="left")
    picture, mask = draw(spec, 192)
    empty = pixels(replace(spec, identity=None), 192)
    changed = (np.asarray(picture).astype(int) != empty).any(-1)
    inside = np.asarray(mask) > 0
    assert not (changed & ~inside).any()
    assert changed[inside].mean() > 0.98
    body = (np.abs(np.asarray(picture).astype(int) - colour_rgb("purple")) == 0).all(-1)
    assert body.sum() > 2000
    assert inside[body].all()
    assert np.nonzero(inside)[1].mean() < 0.4 * 192


def test_the_mask_follows_the_position():
    centres = [
        np.nonzero(np.asarray(draw(ImageSpec(ANIMAL, "night", position=p))[1]) > 127)[1].mean()
        for p in POSITIONS
    ]
    assert centres[0] < 18 < 22 < centres[1] < 26 < 30 < centres[2]


def test_an_empty_scene_has_an_empty_mask():
    assert not np.asarray(draw(ImageSpec(None, "forest"))[1]).any()


def test_a_grey_picture_has_no_colour():
    grey = pixels(ImageSpec(ANIMAL, "beach", style="grey"))
    assert (grey.max(-1) == grey.min(-1)).all()


def test_held_out_identities_are_a_twelfth_and_never_drawn_for_training():
    everyone = list(identities())
    assert len(set(everyone)) == len(everyone) == 720
    held_out = held_out_identities()
    patterned = sum(i.pattern != "plain" for i in everyone)
    assert patterned / 14 < len(held_out) < patterned / 9
    assert all(i.pattern != "plain" for i in held_out)
    for values, field in (
        (COLOURS, "colour"),
        (COLOURS, "second_colour"),
        (PATTERNS[1:], "pattern"),
        (EARS, "ears"),
        (SHAPES, "shape"),
    ):
        assert {getattr(i, field) for i in held_out} == set(values)
    drawn = {spec.identity for spec in random_specs(4000, 0)}
    assert len(drawn) > 550
    assert not drawn & set(held_out)


def test_shares_of_empty_and_grey_pictures_are_kept():
    specs = random_specs(3000, 1, empty_share=0.1, grey_share=0.2)
    assert 0.07 < np.mean([s.identity is None for s in specs]) < 0.13
    assert 0.16 < np.mean([s.style == "grey" for s in specs]) < 0.24
    fixed = random_spec(random.Random(0), ANIMAL, empty_share=1.0)
    assert fixed.identity == ANIMAL


def test_hat_and_crown_are_never_together():
    assert not any({"hat", "crown"} <= set(s.accessories) for s in random_specs(3000, 2))


def test_the_bundled_picture_is_a_held_out_identity_as_drawn():
    from PIL import Image

    assert SUBJECT_IDENTITY.held_out
    with Image.open(bundled_subject_image()) as bundled:
        assert bundled.size == (192, 192)
        spec = ImageSpec(SUBJECT_IDENTITY, SUBJECT_SCENE, mirrored=True)
        assert np.array_equal(np.asarray(bundled.convert("RGB")), np.asarray(draw(spec, 192)[0]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("teal", None, "plain", "big", "tall"), "colour is 'teal'"),
        (("red", None, "spotted", "big", "tall"), "None belongs to the plain"),
        (("red", "blue", "plain", "big", "tall"), "None belongs to the plain"),
        (("red", "red", "striped", "big", "tall"), "must differ"),
        (("red", "blue", "striped", "floppy", "tall"), "ears is 'floppy'"),
    ],
)
def test_impossible_identities_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Identity(*arguments)


def test_impossible_pictures_are_refused():
    with pytest.raises(ValueError, match="scene is 'moon'"):
        ImageSpec(ANIMAL, "moon")
    with pytest.raises(ValueError, match="accessories"):
        ImageSpec(ANIMAL, "snow", ("sword",))
    with pytest.raises(ValueError, match="must divide 192"):
        draw(ImageSpec(ANIMAL, "snow"), 50)
