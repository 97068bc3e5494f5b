"""Studies: the settings they name, their prompts, and one key for equal settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evals.studies.prompts import KINDS, study_subjects
from evals.studies.variants import Variant, make_studies
from sefi_fast.evaluation.judge_scorer import asked_by
from sefi_fast.tiny_world.captions import VOCABULARY
from sefi_fast.tiny_world.drawing import ACCESSORIES, SCENES
from sefi_fast.training import TrainConfig


def by_name(name: str, base: TrainConfig | None = None) -> dict[str, Variant]:
    (study,) = make_studies(name, base)
    return {variant.name: variant for variant in study.variants}


def test_equal_settings_have_one_key():
    sefi = by_name("peers")["sefi"].key
    for study, name in (("lambda", "λ = 0.003"), ("loss", "subject-wise"), ("pairs", "5 split"),
                        ("module", "self-attention module")):  # fmt: skip
        assert by_name(study)[name].key == sefi
    assert by_name("lambda")["λ = 0"].key == by_name("loss")["none"].key
    base = TrainConfig()
    assert Variant("a", TrainConfig(keep_checkpoints=7, device="cpu")).key == sefi
    assert Variant("b", TrainConfig(steps=base.steps + 1)).key != sefi
    assert Variant("b", base, scene_named=False).key != sefi
    for study in make_studies("all"):
        assert len({variant.key for variant in study.variants}) == len(study.variants)


def test_peers_have_the_conditioning_of_their_presets_and_equal_steps():
    peers = by_name("peers", TrainConfig(steps=77, batch_size=3))
    for name, stages in (("Textual Inversion", 1), ("ProSpect's conditioning", 10)):
        plain, ours = peers[name].config, peers[f"{name} in our recipe"].config
        assert (plain.stages, plain.split, plain.weight_lambda, plain.snr_gamma) == (
            stages, False, 0, None,
        )  # fmt: skip
        assert (ours.schedule, ours.flip, ours.snr_gamma, ours.stages) == (
            "cosine",
            True,
            5,
            stages,
        )
    for variant in peers.values():
        assert (variant.config.steps, variant.config.batch_size) == (77, 3)


def test_the_base_holds_for_every_variant():
    for study in make_studies("all", TrainConfig(precision="bf16", learning_rate=0.1, steps=8)):
        configs = [variant.config for variant in study.variants]
        assert all(config.precision == "bf16" for config in configs)
        if study.name not in ("rate", "peers", "better"):
            assert all(config.learning_rate == 0.1 for config in configs)
        for name, config in zip([v.name for v in study.variants], configs, strict=True):
            assert config.steps == 8 or study.name == "steps" or "the steps" in name


@pytest.mark.parametrize("name", ["lamda", "", []])
def test_an_unknown_study_is_refused(name):
    with pytest.raises(ValueError, match="lambda, loss, pairs"):
        make_studies(name)


@pytest.fixture(scope="module")
def subjects():
    return study_subjects(66, 12)


def test_subjects_are_held_out_and_the_first_stay_the_same(subjects):
    assert len({one.identity for one in subjects}) == 66
    assert all(one.identity.held_out for one in subjects)
    for one, other in zip(study_subjects(3, 7), subjects, strict=False):
        assert one.image == other.image and one.prompts == other.prompts[:7]
    assert [s.identity for s in study_subjects(5, 1, seed=1)] != [s.identity for s in subjects[:5]]


def test_prompts_ask_in_the_models_words_for_what_they_say(subjects):
    for one in subjects:
        assert tuple(prompt.kind for prompt in one.prompts) == KINDS * 2
        for prompt in one.prompts:
            asked, spelled = asked_by(prompt.text), prompt.spelled_out(one.identity).split()
            assert asked.wanted == prompt.wanted and asked.change == prompt.change
            assert set(spelled) | {*prompt.text.split()} - {"{}"} <= set(VOCABULARY)
            seen = replace(one.identity, **prompt.change)
            assert {seen.colour, seen.second_colour, seen.ears, seen.shape} <= set(spelled)
            assert set(prompt.tail.split()) <= set(spelled)


def test_prompts_differ_from_the_image_in_scene_position_and_change(subjects):
    for one in subjects:
        for prompt in one.prompts:
            assert prompt.wanted["scene"] != one.image.scene
            assert prompt.wanted.get("position") != one.image.position
            assert bool(prompt.change) == (prompt.kind in ("attribute", "markings"))
            changed = {n for n, v in prompt.change.items() if getattr(one.identity, n) != v}
            assert changed or not prompt.change
            assert prompt.change.get("second_colour") != one.identity.colour
            if prompt.kind == "rare":
                assert sum(name in prompt.wanted for name in ACCESSORIES) == 3
                assert not {"hat", "crown"} <= prompt.wanted.keys()


def test_open_prompts_name_no_scene(subjects):
    for one in subjects:
        texts = [prompt.text for prompt in one.open_prompts]
        assert texts[0] == "a photo of a {}" and len(set(texts)) == 3
        for prompt in one.open_prompts:
            assert asked_by(prompt.text).wanted == prompt.wanted and not prompt.change
            assert "scene" not in prompt.wanted and not set(SCENES) & set(prompt.text.split())
            assert prompt.wanted.get("position") != one.image.position


@pytest.mark.parametrize(("count", "prompts"), [(0, 1), (67, 1), (1, 0)])
def test_impossible_numbers_are_refused(count, prompts):
    with pytest.raises(ValueError, match="must be"):
        study_subjects(count, prompts)
