"""Attention overfit of subjects with a known answer."""

from __future__ import annotations

import pytest
import torch

from evals.studies import attention_overfit
from sefi_fast.pipelines import attach, load_pipeline, trace
from sefi_fast.prompts.tokenization import class_token_ids
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.tiny_world.drawing import SUBJECT_IDENTITY, ImageSpec, draw
from sefi_fast.training import prepare
from sefi_fast.training.latents import load_mask

SENTENCE = "a photo of a {} in the forest"


@pytest.fixture(scope="module")
def pipe():
    loaded = load_pipeline(None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def shown():
    image, mask = draw(ImageSpec(SUBJECT_IDENTITY, "forest"), 192)
    return prepare(image, 48), load_mask(mask, image, 48)


def attached(pipe, *words: str) -> Subject:
    """A subject whose K and V rows of each stage are those of known words, [stages, 2, C]."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    rows = {w: table[class_token_ids(pipe.tokenizer, w)[0]] for w in (*words, CLASS_WORD)}
    tokens = torch.stack([torch.stack([rows[word]] * 2) for word in words])
    subject = Subject("<it>", CLASS_WORD, [tokens], [rows[CLASS_WORD]], "tiny", {})
    attach(pipe, subject)
    return subject


def test_the_class_word_overfits_nothing_and_the_pipeline_stays(pipe, shown):
    subject = attached(pipe, CLASS_WORD, CLASS_WORD)
    hooks = dict(pipe.unet._forward_pre_hooks)
    found = attention_overfit(pipe, subject, *shown, SENTENCE)
    assert found.correlation == pytest.approx(1, abs=1e-5)
    assert found.inside == pytest.approx(found.class_inside, abs=1e-5)
    assert found.taken == pytest.approx(1, abs=1e-4)
    assert found.class_inside > 1.5 * found.mask
    assert dict(pipe.unet._forward_pre_hooks) == hooks
    with trace(pipe, ["<it>"]) as recorded:
        pipe("a photo of a <it>", num_inference_steps=1)
    assert recorded.maps["<it>"].sum() > 0


def test_another_word_looks_elsewhere_and_disturbs_the_others(pipe, shown):
    found = attention_overfit(pipe, attached(pipe, "forest", "forest"), *shown, SENTENCE)
    assert found.inside < 0.93 * found.class_inside
    assert found.correlation < 0.9 and found.taken < 0.5


def test_the_mask_decides_what_is_inside(pipe, shown):
    (pixels, mask), subject = shown, attached(pipe, CLASS_WORD)
    whole, one, rest = (
        attention_overfit(pipe, subject, pixels, part, SENTENCE, samples=1)
        for part in (torch.ones_like(mask), mask, 1 - mask)
    )
    assert whole.inside == pytest.approx(1) and whole.mask == 1
    assert one.inside + rest.inside == pytest.approx(1, abs=1e-5)


def test_an_empty_mask_or_a_sentence_without_subject_is_refused(pipe, shown):
    subject = attached(pipe, CLASS_WORD)
    with pytest.raises(ValueError, match="has no {}"):
        attention_overfit(pipe, subject, *shown, "a photo of a creature")
    with pytest.raises(ValueError, match="mask is empty"):
        attention_overfit(pipe, subject, shown[0], torch.zeros(48, 48), SENTENCE)
