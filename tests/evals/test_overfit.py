"""Attention overfit: what it says of subjects whose answer is known."""

from __future__ import annotations

import pytest
import torch

from evals.studies import attention_overfit
from sefi_fast.pipelines import attach, load_pipeline, trace
from sefi_fast.prompts.tokenization import class_token_ids
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.tiny_world.drawing import Identity, ImageSpec, draw
from sefi_fast.training import prepare
from sefi_fast.training.latents import load_mask

SPEC = ImageSpec(Identity("purple", "orange", "spotted", "big", "round"), "forest")
SENTENCE = "a photo of a {} in the forest"


@pytest.fixture(scope="module")
def pipe():
    loaded = load_pipeline(None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def shown():
    picture, mask = draw(SPEC, 192)
    return prepare(picture, 48), load_mask(mask, picture, 48)


def subject_like(pipe, *words: str) -> Subject:
    """A subject whose K and V rows of each stage are those of known words, [stages, 2, C]."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach()

    def row(word: str) -> torch.Tensor:
        return table[class_token_ids(pipe.tokenizer, word)[0]]

    tokens = torch.stack([torch.stack([row(word)] * 2) for word in words])
    return Subject("<it>", CLASS_WORD, [tokens], [row(CLASS_WORD)], "tiny", {})


def test_the_class_word_itself_overfits_nothing(pipe, shown):
    subject = subject_like(pipe, CLASS_WORD, CLASS_WORD)
    found = attention_overfit(attach(pipe, subject), subject, *shown, SENTENCE)
    assert found.correlation == pytest.approx(1, abs=1e-5)
    assert found.inside == pytest.approx(found.class_inside, abs=1e-5)
    assert found.taken == pytest.approx(1, abs=1e-4)
    assert found.class_inside > 1.5 * found.mask


def test_another_word_looks_elsewhere_and_disturbs_the_others(pipe, shown):
    subject = subject_like(pipe, "forest", "forest")
    found = attention_overfit(attach(pipe, subject), subject, *shown, SENTENCE)
    assert found.inside < 0.93 * found.class_inside
    assert found.correlation < 0.9 and found.taken < 0.5


def test_the_mask_is_what_counts(pipe, shown):
    pixels, mask = shown
    subject = subject_like(pipe, CLASS_WORD)
    attach(pipe, subject)
    whole = attention_overfit(pipe, subject, pixels, torch.ones_like(mask), SENTENCE, draws=1)
    assert whole.inside == pytest.approx(1) and whole.mask == 1
    one = attention_overfit(pipe, subject, pixels, mask, SENTENCE, draws=1)
    rest = attention_overfit(pipe, subject, pixels, 1 - mask, SENTENCE, draws=1)
    assert one.inside + rest.inside == pytest.approx(1, abs=1e-5)


def test_it_leaves_the_pipeline_as_it_was(pipe, shown):
    subject = subject_like(pipe, CLASS_WORD)
    attach(pipe, subject)
    hooks = dict(pipe.unet._forward_pre_hooks)
    attention_overfit(pipe, subject, *shown, SENTENCE, levels=1, draws=1)
    assert dict(pipe.unet._forward_pre_hooks) == hooks
    with trace(pipe, ["<it>"]) as found:
        pipe("a photo of a <it>", num_inference_steps=1)
    assert found.maps["<it>"].sum() > 0


def test_what_cannot_be_measured_is_refused(pipe, shown):
    subject = subject_like(pipe, CLASS_WORD)
    attach(pipe, subject)
    with pytest.raises(ValueError, match="has no {}"):
        attention_overfit(pipe, subject, *shown, "a photo of a creature")
    with pytest.raises(ValueError, match="mask is empty"):
        attention_overfit(pipe, subject, shown[0], torch.zeros(48, 48), SENTENCE)
