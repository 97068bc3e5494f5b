"""Captions name only what is drawn, name enough of it, and use one token per word."""

from __future__ import annotations

import random

import pytest
from transformers import CLIPTokenizer

from sefi_fast.tiny_world import CLASS_WORD, bundled_model_path
from sefi_fast.tiny_world.captions import PATTERN_NOUNS, VOCABULARY, caption, pair_caption
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


def test_a_caption_names_only_what_is_drawn(captioned):
    for spec, text in captioned:
        words, identity = set(text.split()), spec.identity
        assert words & set(ACCESSORIES) <= set(spec.accessories)
        assert words & set(SCENES) <= {spec.scene}
        assert ("grey" in words) == (spec.style == "grey")
        assert (CLASS_WORD in words) == (identity is not None)
        if identity is not None:
            assert words & set(POSITIONS) <= {spec.position}
            assert words & set(COLOURS) <= {identity.colour, identity.second_colour}
            assert words & set(EARS) <= {identity.ears}
            assert words & set(SHAPES) <= {identity.shape}
            assert words & set(PATTERN_NOUNS.values()) <= {PATTERN_NOUNS.get(identity.pattern)}


def test_wording_and_articles_follow_the_seed():
    spec = ImageSpec(Identity("orange", "blue", "striped", "long", "tall"), "city", ("hat",))
    texts = [caption(spec, random.Random(seed)) for seed in range(200)]
    assert len(set(texts)) > 50
    assert texts[7] == caption(spec, random.Random(7))
    assert any("an orange" in text for text in texts)
    assert not any("a orange" in text or "an creature" in text for text in texts)


def test_every_word_is_one_token_of_the_bundled_tokenizer(captioned):
    tokenizer = CLIPTokenizer.from_pretrained(bundled_model_path() / "tokenizer")
    assert all(len(tokenizer(word).input_ids) == 3 for word in VOCABULARY)
    for _, text in captioned[:400]:
        words = text.split()
        assert set(words) <= set(VOCABULARY)
        assert len(tokenizer(text).input_ids) == len(words) + 2 <= tokenizer.model_max_length


def test_a_pairs_caption_names_the_left_one_first_and_the_scene_once():
    red = ImageSpec(Identity("red", "white", "striped", "big", "round"), "snow")
    blue = ImageSpec(Identity("blue", None, "plain", "long", "tall"), "snow", ("hat",))
    rng = random.Random(0)
    captions = {pair_caption(red, blue, rng) for _ in range(60)}
    assert len(captions) > 40
    for text in captions:
        assert set(text.split()) <= set(VOCABULARY)
        assert text.count("creature") == 2 and text.count("in the snow") <= 1
        before, after = text.split("creature", 1)[0], text.split(" creature")[-1]
        assert "blue" not in before and "striped" not in after and "stripes" not in after
