"""Studies: the settings they name, and one key for equal ones."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import fields

import pytest

from evals.studies.variants import STUDIES, Variant, make_studies
from sefi_fast.training import TrainConfig


def by_name(name: str, base: TrainConfig | None = None) -> dict[str, Variant]:
    (study,) = make_studies(name, base)
    return {variant.name: variant for variant in study.variants}


def test_all_means_all():
    assert [study.name for study in make_studies("all")] == list(STUDIES)


def test_equal_settings_are_one_training():
    sefi = by_name("peers")["sefi"].key
    assert by_name("lambda")["λ = 0.003"].key == sefi
    assert by_name("loss")["subject-wise"].key == sefi
    assert by_name("pairs")["5 split"].key == sefi
    assert by_name("module")["self-attention module"].key == sefi
    assert by_name("lambda")["λ = 0"].key == by_name("loss")["none"].key


def test_within_a_study_no_two_are_equal():
    for study in make_studies("all"):
        assert len({variant.key for variant in study.variants}) == len(study.variants)


def test_what_changes_no_number_changes_no_key():
    base = TrainConfig()
    same = Variant("a", TrainConfig(keep_checkpoints=7, device="cpu"))
    assert Variant("b", base).key == same.key
    assert Variant("b", TrainConfig(steps=base.steps + 1)).key != same.key
    assert Variant("b", base, scene_named=False).key != same.key


def test_peers_have_the_conditioning_of_their_presets_and_equal_steps():
    peers = by_name("peers", TrainConfig(steps=77, batch_size=3))
    inversion = peers["Textual Inversion"].config
    prospect = peers["ProSpect's conditioning"].config
    assert (inversion.stages, inversion.split, inversion.weight_lambda) == (1, False, 0)
    assert (prospect.stages, prospect.split, prospect.weight_lambda) == (10, False, 0)
    for variant in peers.values():
        assert (variant.config.steps, variant.config.batch_size) == (77, 3)
    assert inversion.snr_gamma is prospect.snr_gamma is None
    ours = peers["Textual Inversion in our recipe"].config
    assert (ours.schedule, ours.flip, ours.snr_gamma, ours.stages) == ("cosine", True, 5, 1)


def test_the_base_holds_for_every_variant():
    for study in make_studies("all", TrainConfig(precision="bf16", learning_rate=0.1, steps=8)):
        configs = [variant.config for variant in study.variants]
        assert all(config.precision == "bf16" for config in configs)
        if study.name not in ("rate", "peers", "better"):
            assert all(config.learning_rate == 0.1 for config in configs)
        others = {variant.name for variant in study.variants if variant.config.steps != 8}
        wanted = {
            "vectors": {"3 vectors, λ = 0.01, half the steps"},
            "choices": {"half the copies, twice the steps", "twice the copies, half the steps"},
        }
        if study.name != "steps":
            assert others == wanted.get(study.name, set())
    assert [v.value for v in by_name("pairs").values()] == [1, 3, 5, 7, 9, 10, 1, 5, 10]


def test_vectors_change_what_their_names_say():
    found = {name: variant.config for name, variant in by_name("vectors").items()}
    assert found["1 vector"] == TrainConfig()
    for name, config in found.items():
        assert str(config.num_vectors or 1) == re.search(r"(\d) vector", name).group(1)
    assert found["3 vectors, λ = 0.01"] == TrainConfig.preset("likeness")
    plain = found["Textual Inversion in our recipe, 3 vectors"]
    assert (plain.stages, plain.split, plain.module) == (1, False, "free")
    assert plain.weight_lambda == 0 and plain.learning_rate == TrainConfig().learning_rate


def test_results_from_before_there_were_vectors_are_found():
    one, three = (TrainConfig(num_vectors=count) for count in (None, 3))
    kept = {field.name: getattr(one, field.name) for field in fields(one)
            if not field.metadata["resumable"] and field.name != "num_vectors"}  # fmt: skip
    text = json.dumps(kept, sort_keys=True, default=list)
    assert Variant("x", one).key == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert Variant("x", three).key != Variant("x", one).key


def test_batches_of_another_size_see_as_many_noised_copies():
    found = {name: variant.config for name, variant in by_name("choices").items()}
    default = TrainConfig()
    for name, config in found.items():
        assert config.steps * config.batch_size == default.steps * default.batch_size, name
    assert found["ended on a plateau"].patience == default.steps // 6


@pytest.mark.parametrize("name", ["lamda", "", []])
def test_an_unknown_study_is_told_with_those_there_are(name):
    with pytest.raises(ValueError, match="lambda, loss, pairs"):
        make_studies(name)
