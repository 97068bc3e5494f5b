"""Scores of images: each counts what it says, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sefi_fast.evaluation import score_image
from sefi_fast.evaluation.scorers import AskedAttributes
from sefi_fast.tiny_world.drawing import Identity, ImageSpec, draw
from sefi_fast.tiny_world.judge import ATTRIBUTES, Judge, Judgement, true_values

IDENTITY = Identity("purple", "orange", "spotted", "big", "round")
SPEC = ImageSpec(IDENTITY, "snow", ("hat",), "left")
ASKED = {"creature": "yes", "scene": "snow", "hat": "yes", "position": "left"}


def certain(spec: ImageSpec) -> Judgement:
    """A judge who is right and sure of it."""
    values = true_values(spec)
    return Judgement(
        {
            name: {value: float(value == values[name]) for value in choices}
            for name, choices in ATTRIBUTES.items()
        }
    )


def prompt(**changed: str) -> AskedAttributes:
    return AskedAttributes(ASKED | changed)


def test_a_picture_that_shows_everything_has_every_score():
    score = score_image(certain(SPEC), prompt(), IDENTITY, "beach")
    assert (score.prompt, score.share, score.id, score.id_p, score.leak) == (1, 1, 1, 1, 0)
    assert score.rank == 1


def test_one_missing_attribute_costs_the_prompt_and_id_p_but_not_id():
    score = score_image(certain(replace(SPEC, accessories=())), prompt(), IDENTITY, "beach")
    assert (score.prompt, score.share, score.id, score.id_p) == (0, 0.75, 1, 0)


def test_another_identity_scores_by_what_is_alike():
    other = replace(IDENTITY, colour="red", ears="long")
    score = score_image(certain(replace(SPEC, identity=other)), prompt(), IDENTITY, "beach")
    assert score.id == pytest.approx(3 / 5)
    assert score.prompt == 1 and score.id_p == pytest.approx(3 / 5)
    assert 0.5 < score.rank < 1


def test_rank_is_a_half_for_a_picture_of_nothing_in_particular():
    even = Judgement(
        {name: dict.fromkeys(values, 1 / len(values)) for name, values in ATTRIBUTES.items()}
    )
    assert score_image(even, prompt(), IDENTITY, "beach").rank == pytest.approx(0.5)


def test_an_attribute_that_the_prompt_changes_does_not_count_for_id():
    changed = AskedAttributes(ASKED | {"ears": "long"}, {"ears": "long"})
    obeyed = certain(replace(SPEC, identity=replace(IDENTITY, ears="long")))
    assert score_image(obeyed, changed, IDENTITY, "beach").id_p == 1
    ignored = score_image(certain(SPEC), changed, IDENTITY, "beach")
    assert (ignored.id, ignored.prompt) == (1, 0)


def test_the_reference_scene_is_a_leak_unless_it_was_asked_for():
    assert score_image(certain(SPEC), prompt(scene="beach"), IDENTITY, "snow").leak == 1
    assert score_image(certain(SPEC), prompt(), IDENTITY, "snow").leak == 0
    assert score_image(certain(SPEC), prompt(scene="beach"), IDENTITY, "city").leak == 0


def test_the_bundled_judge_scores_drawings_as_they_are():
    judge = Judge.load()
    judgement = judge([draw(SPEC, 48)[0]])[0]
    score = score_image(judgement, prompt(), IDENTITY, "beach")
    assert score.prompt == 1 and score.id > 0.9 and score.rank > 0.99
    other = Identity("white", "blue", "striped", "long", "tall")
    assert score_image(judgement, prompt(), other, "beach").id < 0.1
