"""Scores by the judge: each counts one thing, and a prompt's words say what is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sefi_fast
from sefi_fast.errors import PromptError
from sefi_fast.evaluation import score_image
from sefi_fast.evaluation.judge_scorer import AskedAttributes, ImageScore, JudgeScorer, asked_by
from sefi_fast.evaluation.prompts import TINY_PROMPTS
from sefi_fast.tiny_world import SUBJECT_SCENE
from sefi_fast.tiny_world.drawing import SUBJECT_IDENTITY, Identity, ImageSpec
from sefi_fast.tiny_world.judge import ATTRIBUTES, Judgement, true_values

SPEC = ImageSpec(SUBJECT_IDENTITY, "snow", ("hat",), "left")
OTHER = replace(SUBJECT_IDENTITY, colour="red", ears="long")
LONG = replace(SUBJECT_IDENTITY, ears="long")
ASKED = {"creature": "yes", "scene": "snow", "hat": "yes", "position": "left"}


def certain(spec: ImageSpec) -> Judgement:
    """A judgement that is right and sure of it."""
    true = true_values(spec)
    return Judgement(
        {name: {v: float(v == true[name]) for v in values} for name, values in ATTRIBUTES.items()}
    )


@pytest.mark.parametrize(
    ("shown", "asked", "change", "reference_scene", "expected"),
    [
        ({}, {}, {}, "beach", dict(prompt=1, share=1, id=1, rank=1, id_p=1, leak=0)),
        ({"accessories": ()}, {}, {}, "beach", dict(prompt=0, share=0.75, id=1, id_p=0)),
        ({"identity": OTHER}, {}, {}, "beach", dict(prompt=1, id=0.6, id_p=0.6)),
        ({"identity": LONG}, {"ears": "long"}, {"ears": "long"}, "beach", dict(id_p=1)),
        ({}, {"ears": "long"}, {"ears": "long"}, "beach", dict(id=1, prompt=0)),
        ({}, {"scene": "beach"}, {}, "snow", dict(leak=1)),
        ({}, {}, {}, "snow", dict(leak=0)),
        ({}, {"scene": "beach"}, {}, "city", dict(leak=0)),
    ],
)
def test_each_score_counts_one_thing(shown, asked, change, reference_scene, expected):
    prompt = AskedAttributes(ASKED | asked, change)
    judgement = certain(replace(SPEC, **shown))
    score = score_image(judgement, prompt, SUBJECT_IDENTITY, reference_scene)
    assert {name: getattr(score, name) for name in expected} == pytest.approx(expected)
    assert not shown.get("identity") or 0.5 < score.rank <= 1


def test_rank_is_a_half_for_an_image_of_no_identity():
    even = {name: dict.fromkeys(values, 1 / len(values)) for name, values in ATTRIBUTES.items()}
    score = score_image(Judgement(even), AskedAttributes(ASKED), SUBJECT_IDENTITY, "beach")
    assert score.rank == pytest.approx(0.5)


def test_the_subject_is_read_from_the_reference_image():
    scorer, image = JudgeScorer(), Image.open(sefi_fast.bundled_subject_image())
    assert scorer.identity(image) == (SUBJECT_IDENTITY, SUBJECT_SCENE)
    (score,) = scorer([image], "a {} in the desert", image)
    assert isinstance(score, ImageScore) and score.prompt == 1 and score.id > 0.9
    for seed in range(20):
        noise = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        assert isinstance(scorer.identity(Image.fromarray(noise))[0], Identity)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        (
            "a photo of a tall {} with red spots and a hat at night on the left",
            {"scene": "night", "position": "left", "shape": "tall", "pattern": "spotted",
             "second_colour": "red", "hat": "yes"},
        ),
        ("a grey photo of a creature", {"style": "grey"}),
        ("A red, striped {} with a ball.", {"colour": "red", "pattern": "striped", "ball": "yes"}),
        ("my creature wearing a hat next to a ball", {"hat": "yes", "ball": "yes"}),
    ],
)  # fmt: skip
def test_the_words_of_a_prompt_say_what_is_asked_for(prompt, wanted):
    asked = asked_by(prompt)
    assert asked.wanted == {"creature": "yes"} | wanted
    assert asked.change == {name: v for name, v in wanted.items() if hasattr(OTHER, name)}


def test_the_judge_reads_every_default_prompt():
    prompts = [prompt for sentences in TINY_PROMPTS.values() for prompt in sentences]
    assert all(len(asked_by(prompt).wanted) > 2 for prompt in prompts)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a {} riding a bicycle on the moon", "obeys 'riding', 'bicycle', 'moon' in the prompt"),
        ("a {} without a hat", "obeys 'without' in"),
        ("a {} in a red hat", "obeys 'red' in"),
        ("a red background with a {}", "obeys 'red' in"),
        ("a big {} in the snow", "obeys 'big' in"),
        ("a {} on the beach at night", "obeys 'night' in"),
        ("a red and blue {}", "obeys 'blue' in"),
        ("a grey {}", "obeys 'grey' in"),
        ("a round red {} with blue spots and big ears", "Nothing of the subject is left"),
    ],
)
def test_a_prompt_that_the_judge_cannot_read_is_refused(prompt, words):
    with pytest.raises(PromptError, match=words):
        asked_by(prompt)
