"""Prompts of the studies: what they ask for is what they say, and it differs from the image."""

from __future__ import annotations

import pytest

from evals.studies.prompts import KINDS, study_subjects
from sefi_fast.tiny_world.captions import CLASS_WORD, VOCABULARY
from sefi_fast.tiny_world.drawing import ACCESSORIES, PATTERNS, SCENES


@pytest.fixture(scope="module")
def subjects():
    return study_subjects(66, 12)


def test_the_identities_are_held_out_and_differ(subjects):
    assert all(one.identity.held_out for one in subjects)
    assert len({one.identity for one in subjects}) == 66


def test_more_identities_and_prompts_begin_with_the_same_ones(subjects):
    few = study_subjects(3, 7)
    for one, other in zip(few, subjects, strict=False):
        assert one.picture == other.picture
        assert [p.text for p in one.prompts] == [p.text for p in other.prompts[:7]]


def test_another_seed_gives_others(subjects):
    assert [s.identity for s in study_subjects(5, 1, seed=1)] != [s.identity for s in subjects[:5]]


def test_no_prompt_asks_for_the_pictures_own_scene_or_position(subjects):
    for one in subjects:
        for prompt in one.prompts:
            assert prompt.wanted["scene"] != one.picture.scene
            assert prompt.wanted.get("position") != one.picture.position


def test_every_word_is_in_the_models_vocabulary(subjects):
    for one in subjects:
        for prompt in one.prompts:
            for text in (prompt.text.format(CLASS_WORD), prompt.spelled_out(one.identity)):
                assert set(text.split()) <= set(VOCABULARY), text


def test_what_is_wanted_stands_in_the_prompt(subjects):
    for one in subjects:
        for prompt in one.prompts:
            for name, value in prompt.wanted.items():
                if name in ACCESSORIES:
                    assert f"a {name}" in prompt.text
                elif name == "pattern":
                    assert {"striped": "stripes", "spotted": "spots"}[value] in prompt.text
                elif name != "creature":
                    assert value in prompt.text.split(), (name, prompt.text)
            named = {name for name in ACCESSORIES if name in prompt.text.split()}
            assert named == {name for name in prompt.wanted if name in ACCESSORIES}


def test_a_change_is_one_and_both_wordings_say_it(subjects):
    for one in subjects:
        for prompt in one.prompts:
            assert bool(prompt.change) == (prompt.kind in ("attribute", "markings"))
            if prompt.change:
                assert any(getattr(one.identity, n) != v for n, v in prompt.change.items())
            for name, value in prompt.change.items():
                word = {"striped": "stripes", "spotted": "spots"}.get(value, value)
                assert word in prompt.text.split(), name
                assert word in prompt.spelled_out(one.identity).split()
            assert prompt.change.get("second_colour") != one.identity.colour


def test_the_kinds_go_round_and_rare_ones_ask_for_three_accessories(subjects):
    for one in subjects:
        assert tuple(p.kind for p in one.prompts) == KINDS * 2
        for prompt in one.prompts:
            if prompt.kind == "rare":
                assert sum(name in prompt.wanted for name in ACCESSORIES) == 3
                assert not {"hat", "crown"} <= prompt.wanted.keys()


def test_open_prompts_leave_the_scene_to_the_subject(subjects):
    for one in subjects:
        texts = [prompt.text.format(CLASS_WORD) for prompt in one.open_prompts]
        assert texts[0] == "a photo of a creature" and len(set(texts)) == 3
        for prompt in one.open_prompts:
            assert "scene" not in prompt.wanted and not prompt.change
            assert not any(scene in prompt.text.split() for scene in SCENES)
            assert prompt.wanted.get("position") != one.picture.position


def test_spelled_out_names_the_whole_identity(subjects):
    one = subjects[0]
    words = one.prompts[0].spelled_out(one.identity).split()
    assert {one.identity.shape, one.identity.colour, one.identity.second_colour} <= set(words)
    assert one.identity.ears in words and one.identity.pattern in PATTERNS


@pytest.mark.parametrize(("count", "prompts"), [(0, 1), (67, 1), (1, 0)])
def test_impossible_numbers_are_refused(count, prompts):
    with pytest.raises(ValueError, match="must be"):
        study_subjects(count, prompts)
