"""The judge is right on fresh drawings of held-out identities, also blurred ones and pairs."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageFilter

from evals.tiny_world.pairs import draw_pair, halves_of, random_pair
from sefi_fast.tiny_world import judge as judging
from sefi_fast.tiny_world.drawing import (
    ImageSpec,
    draw,
    held_out_identities,
    random_spec,
)
from sefi_fast.tiny_world.judge import ATTRIBUTES, Judge, right_answers


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.mark.parametrize(("blur", "least"), [(0, 0.94), (0.7, 0.9)])
def test_it_is_right_on_fresh_drawings_of_held_out_identities(judge, blur, least):
    rng, held_out = random.Random(99), held_out_identities()
    specs = [random_spec(rng, rng.choice(held_out), grey_share=0.1) for _ in range(250)]
    images = [draw(spec)[0].filter(ImageFilter.GaussianBlur(blur)) for spec in specs]
    found = right_answers(specs, judge(images))
    assert set(found) == set(ATTRIBUTES)
    assert min(found.values()) > least and np.mean(list(found.values())) > 0.97


def test_it_reads_an_empty_scene(judge):
    found = judge([draw(ImageSpec(None, scene))[0] for scene in ("beach", "city", "night")])
    assert [(one.labels["creature"], one.labels["scene"]) for one in found] == [
        ("no", "beach"), ("no", "city"), ("no", "night"),
    ]  # fmt: skip


def test_it_reads_each_creature_in_its_half_of_a_pair(judge):
    rng, right = random.Random(5), []
    specs = [random_pair(rng) for _ in range(40)]
    halves = [half for spec in specs for half in halves_of(draw_pair(spec))]
    shown = [half.identity for spec in specs for half in (spec.left, spec.right)]
    for found, identity in zip(judge(halves), shown, strict=True):
        assert not identity.held_out
        right += [found.labels[name] == identity.value(name) for name in ("colour", "ears")]
    assert np.mean(right) > 0.97


def test_the_likeness_falls_with_each_wrong_attribute(judge):
    identity = held_out_identities()[0]
    found = judge([draw(ImageSpec(identity, "snow"))[0]])[0]
    assert found.shows(identity) > 0.95
    assert 0.7 < found.shows(replace(identity, shape="round")) < 0.85
    assert 0.3 < found.shows(replace(identity, shape="round", ears="long", colour="white")) < 0.5


def test_probabilities_sum_to_one_in_batches_of_any_size(judge, monkeypatch):
    images = [draw(ImageSpec(one, "desert"))[0] for one in held_out_identities()[:5]]
    together = judge(images)
    monkeypatch.setattr(judging, "_BATCH", 2)
    for one, other in zip(together, judge(images), strict=True):
        for name, values in one.probabilities.items():
            assert sum(values.values()) == pytest.approx(1, abs=1e-5)
            assert values == pytest.approx(other.probabilities[name], abs=1e-4)
