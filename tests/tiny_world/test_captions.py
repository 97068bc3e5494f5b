"""Captions: they name only what is drawn, name enough of it, and are one token a word."""

from __future__ import annotations

import random

import numpy as np
import pytest
from transformers import CLIPTokenizer

from sefi_fast.tiny_world import CLASS_WORD, bundled_model_path
from sefi_fast.tiny_world.captions import PATTERN_NOUNS, VOCABULARY, caption
from sefi_fast.tiny_world.drawing import (
    ACCESSORIES,
    COLOURS,
    EARS,
    POSITIONS,
    SCENES,
    SHAPES,
    Identity,
    ImageSpec,
    random_specs,
)


@pytest.fixture(scope="module")
def captioned() -> list[tuple[ImageSpec, str]]:
    rng = random.Random(0)
    return [(spec, caption(spec, rng)) for spec in random_specs(3000, 5)]


def test_a_caption_names_nothing_that_is_not_drawn(captioned):
    for spec, text in captioned:
        words, identity = set(text.split()), spec.identity
        assert words & set(ACCESSORIES) <= set(spec.accessories)
        assert words & set(SCENES) <= {spec.scene}
        assert ("grey" in words) == (spec.style == "grey")
        if identity is None:
            assert CLASS_WORD not in words
            continue
        assert words & set(POSITIONS) <= {spec.position}
        assert words & set(COLOURS) <= {identity.colour, identity.second_colour}
        assert words & set(EARS) <= {identity.ears}
        assert words & set(SHAPES) <= {identity.shape}
        assert words & set(PATTERN_NOUNS.values()) <= {PATTERN_NOUNS.get(identity.pattern)}


def test_captions_name_ears_places_and_scenes_often_and_are_brief_at_times(captioned):
    texts = [text for spec, text in captioned if spec.identity is not None]
    ears = np.mean(["ears" in text for text in texts])
    sides = np.mean(
        [spec.position in text.split() for spec, text in captioned if spec.position != "middle"]
    )
    scenes = np.mean([spec.scene in text.split() for spec, text in captioned])
    brief = np.mean([not set(text.split()) & {*COLOURS, *SHAPES, "ears"} for text in texts])
    assert 0.5 < ears < 0.7
    assert 0.6 < sides < 0.8
    assert 0.8 < scenes < 0.95
    assert 0.15 < brief < 0.3


def test_the_wording_is_drawn_anew():
    spec = ImageSpec(Identity("red", "blue", "striped", "long", "tall"), "city", ("hat",))
    rng = random.Random(1)
    assert len({caption(spec, rng) for _ in range(50)}) > 25
    assert caption(spec, random.Random(7)) == caption(spec, random.Random(7))


def test_every_word_is_one_token_of_the_bundled_tokenizer(captioned):
    tokenizer = CLIPTokenizer.from_pretrained(bundled_model_path() / "tokenizer")
    for word in VOCABULARY:
        assert len(tokenizer(word).input_ids) == 3, word
    for _, text in captioned[:400]:
        words = text.split()
        assert set(words) <= set(VOCABULARY)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(words) + 2 <= tokenizer.model_max_length


def test_articles_follow_the_next_word():
    spec = ImageSpec(Identity("orange", None, "plain", "long", "tall"), "city")
    texts = [caption(spec, random.Random(seed)) for seed in range(200)]
    assert any("an orange" in text for text in texts)
    assert not any("a orange" in text or "an creature" in text for text in texts)
