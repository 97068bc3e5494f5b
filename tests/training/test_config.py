"""Settings are checked one by one, and say what is wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sefi_fast.training import TrainConfig


def test_defaults_are_valid_and_frozen():
    config = TrainConfig()
    assert config.weight_lambda == 0.003
    assert config.stages == 5
    assert config.split
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -5),
        ("batch_size", 0),
        ("stages", 0),
        ("num_vectors", 0),
        ("num_vectors", 33),
        ("seed", -1),
        ("seed", 2**64),
        ("resolution", 0),
        ("validation_every", 0),
        ("validation_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("weight_lambda", -0.1),
        ("weight_lambda", float("nan")),
        ("schedule", "polynomial"),
        ("module", "mlp"),
        ("crop", "middle"),
        ("precision", "fp8"),
        ("self_attention", "flash"),
        ("templates", ()),
        ("templates", ("a photo of a cat",)),
        ("templates", ("a photo of {}", "a photo")),
        ("validation_prompts", ("in the snow",)),
        ("scene", "  "),
        ("scene", "behind {}"),
        ("loss_resolutions", ()),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 2.0),
        ("steps", True),
        ("steps", "300"),
        ("batch_size", None),
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("flip", 1),
        ("split", "yes"),
        ("reference_grad", None),
        ("templates", "a photo of a {}"),
        ("templates", (1, 2)),
        ("validation_prompts", "a {}"),
        ("attention_backend", 3),
        ("device", 0),
        ("scene", 7),
        ("loss_resolutions", 16),
        ("loss_resolutions", (16.0,)),
    ],
)
def test_wrong_types_are_named(name, value):
    with pytest.raises(TypeError, match=name):
        TrainConfig(**{name: value})


def test_overrides_replace_fields_of_a_config():
    config = TrainConfig(steps=7, seed=3)
    changed = TrainConfig.from_overrides(config, {"steps": 9, "templates": ["a {}"]})
    assert (changed.steps, changed.seed, changed.templates) == (9, 3, ("a {}",))
    assert config.steps == 7
    assert TrainConfig.from_overrides(None, {}) == TrainConfig()


def test_an_unknown_override_is_named_together_with_what_there_is():
    with pytest.raises(TypeError, match=r"stepps.*the settings are steps, batch_size"):
        TrainConfig.from_overrides(None, {"stepps": 3})
    with pytest.raises(TypeError, match="TrainConfig, got dict"):
        TrainConfig.from_overrides({"steps": 3}, {})


def test_the_scene_stands_behind_every_template():
    config = TrainConfig(templates=("a {}", "one {}"), scene="in the forest")
    assert config.sentences() == ("a {} in the forest", "one {} in the forest")
    assert TrainConfig(templates=("a {}",)).sentences() == ("a {}",)


def test_settings_survive_json():
    config = TrainConfig(loss_resolutions=[8, 16], validation_prompts=("a {}",))
    again = TrainConfig(**json.loads(json.dumps(config.as_dict())))
    assert again == config


def test_every_field_has_a_line_of_help():
    for field in dataclasses.fields(TrainConfig):
        assert len(field.metadata["help"]) > 5, field.name
