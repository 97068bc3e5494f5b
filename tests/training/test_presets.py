"""Presets: what they set, what wins over them, and that older methods come out of them."""

from __future__ import annotations

import pytest

import sefi_fast
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training import TrainConfig, train
from sefi_fast.training.config import PRESETS


def test_sefi_is_the_default():
    assert TrainConfig.preset("sefi") == TrainConfig()


@pytest.mark.parametrize(("name", "stages"), [("textual-inversion", 1), ("prospect", 10)])
def test_older_methods_are_tied_free_rows_without_attention_loss(name, stages):
    config = TrainConfig.preset(name)
    assert (config.stages, config.split, config.module) == (stages, False, "free")
    assert config.weight_lambda == 0 and config.schedule == "constant"
    assert config.snr_gamma is None and config.learning_rate == 2e-3


@pytest.mark.parametrize("name", PRESETS)
def test_overrides_win(name):
    assert TrainConfig.preset(name, stages=3, steps=5).stages == 3


def test_likeness_is_the_method_with_three_vectors():
    config = TrainConfig.preset("likeness")
    assert config == TrainConfig(num_vectors=3, weight_lambda=0.01)
    subject = train(sefi_fast.bundled_subject_image(), config=config, steps=2, batch_size=2)
    assert subject.num_vectors == 3 and subject.stages == 5 and subject.split


def test_mistakes_are_named():
    with pytest.raises(
        ValueError, match="'sefi', 'likeness', 'textual-inversion', 'prospect', got 'sifi'"
    ):
        TrainConfig.preset("sifi")
    with pytest.raises(TypeError, match=r"no setting stage \(did you mean stages\?\)"):
        TrainConfig.preset("sefi", stage=1)
    with pytest.raises(ValueError, match="give one of them"):
        train("me.png", preset="sefi", config=TrainConfig())


@pytest.mark.parametrize(("name", "shape"), [("textual-inversion", 1), ("prospect", 10)])
def test_train_takes_a_preset(name, shape):
    subject = train(
        sefi_fast.bundled_subject_image(), class_word=CLASS_WORD, preset=name, steps=2,
        batch_size=2, progress=False,
    )  # fmt: skip
    assert subject.tokens[0].shape[:2] == (shape, 1)
    assert subject.history.subject_loss == [0.0, 0.0]
    assert (subject.tokens[0] - subject.class_embeddings[0]).abs().max() > 1e-3
