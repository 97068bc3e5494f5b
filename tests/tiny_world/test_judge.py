"""The judge: right on fresh drawings of held-out identities, also blurred ones; sound scores."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageFilter

from evals.tiny_world.judge_training import accuracy, spoil, train_judge
from sefi_fast.tiny_world.drawing import (
    ACCESSORIES,
    ImageSpec,
    draw,
    held_out_identities,
    random_spec,
)
from sefi_fast.tiny_world.judge import ATTRIBUTES, JUDGE_PATH, Judge, true_values


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def test_the_bundled_judge_is_small():
    assert JUDGE_PATH.stat().st_size <= 1_500_000


def test_it_is_right_on_fresh_drawings_of_held_out_identities(judge):
    found = accuracy(judge, 300, seed=99)
    assert set(found) == set(ATTRIBUTES)
    assert min(found.values()) > 0.94
    assert sum(found.values()) / len(found) > 0.98


def test_it_is_right_on_blurred_drawings(judge):
    rng, held_out = random.Random(5), held_out_identities()
    specs = [random_spec(rng, rng.choice(held_out), grey_share=0) for _ in range(200)]
    blurred = [draw(s)[0].filter(ImageFilter.GaussianBlur(0.7)) for s in specs]
    found = [judgement.labels for judgement in judge(blurred)]
    for name in ("colour", "second_colour", "pattern", "ears", "shape", "scene", "position"):
        right = [
            labels[name] == true_values(spec)[name]
            for spec, labels in zip(specs, found, strict=True)
        ]
        assert sum(right) / len(right) > 0.9, name


def test_it_finds_an_empty_scene_empty(judge):
    pictures = [draw(ImageSpec(None, scene))[0] for scene in ("beach", "city", "night")]
    found = judge(pictures)
    assert [j.labels["creature"] for j in found] == ["no"] * 3
    assert [j.labels["scene"] for j in found] == ["beach", "city", "night"]


def test_the_identity_score_falls_with_each_wrong_attribute(judge):
    identity = held_out_identities()[0]
    picture = draw(ImageSpec(identity, "snow"))[0]
    own = judge.identity_score(picture, identity)
    one_wrong = judge.identity_score(picture, replace(identity, shape="round"))
    three_wrong = judge.identity_score(
        picture, replace(identity, shape="round", ears="long", colour="white")
    )
    assert own > 0.95
    assert 0.7 < one_wrong < 0.85
    assert 0.3 < three_wrong < 0.5


def test_pictures_of_any_size_give_the_same_answer(judge):
    spec = ImageSpec(held_out_identities()[3], "forest", ("ball",), "left")
    small, large = judge([draw(spec, 48)[0], draw(spec, 192)[0]])
    assert small.labels == large.labels
    assert small.labels["ball"] == "yes"
    assert [small.labels[name] for name in ACCESSORIES].count("yes") == 1


def test_probabilities_sum_to_one_in_every_batch_size(judge):
    pictures = [draw(ImageSpec(i, "desert"))[0] for i in held_out_identities()[:5]]
    together, apart = judge(pictures), judge(pictures, batch_size=2)
    for one, other in zip(together, apart, strict=True):
        for name, values in one.probabilities.items():
            assert sum(values.values()) == pytest.approx(1, abs=1e-5)
            assert values == pytest.approx(other.probabilities[name], abs=1e-4)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"no judge at .*nothing\.safetensors"):
        Judge.load(tmp_path / "nothing.safetensors")


def test_spoiling_changes_a_picture_but_keeps_it_a_picture():
    torch.manual_seed(0)
    before = torch.rand(6, 3, 48, 48) * 2 - 1
    after = spoil(before)
    assert after.shape == before.shape
    assert after.abs().max() <= 1
    assert (after - before).abs().mean((1, 2, 3)).min() > 0.01


def test_training_writes_a_judge_that_loads(tmp_path):
    path = tmp_path / "judge.safetensors"
    found = train_judge(path, pictures=128, max_steps=2, batch_size=16, progress=False)
    assert set(found) == set(ATTRIBUTES)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert Judge.load(path)([Image.new("RGB", (48, 48))])[0].labels.keys() == ATTRIBUTES.keys()
