"""A placeholder that no subject stands behind is told, wherever its prompt is encoded."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from models import make_controlnet
from pipelines.sampling import draw, state_of, subject_for

from sefi_fast import attach, detach, encode
from sefi_fast.errors import PromptError

HINT = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(9))
CLOSE = {"rtol": 0, "atol": 2e-4}
MISSING = "as plain words, so that its subject would be missing"


@pytest.fixture
def attached(sd15_pipeline, make_subject):
    return attach(sd15_pipeline, make_subject())


def over_the_same_models(pipe, kind=StableDiffusionPipeline, **parts):
    other = kind(**pipe.components, **parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize(
    "prompt", ["a <it>", "a <it>, in snow", "(<it>)", "a '<IT>'s hat", "<it>."]
)
def test_another_pipeline_over_the_same_models_says_so(attached, prompt):
    other = over_the_same_models(attached)
    expected = draw(other, "a photo of a dog")
    with pytest.raises(PromptError, match=MISSING):
        draw(other, prompt)
    with pytest.raises(PromptError, match=MISSING):
        draw(other, ["a dog", "a cat"], negative_prompt=["a car", prompt])
    torch.testing.assert_close(draw(other, "a photo of a dog"), expected, rtol=0, atol=1e-5)


def test_a_controlnet_added_after_attaching_by_another_pipeline(attached, make_subject):
    net = make_controlnet(attached.unet, seed=1)
    added = StableDiffusionControlNetPipeline.from_pipe(attached, controlnet=net)
    built = over_the_same_models(attached, StableDiffusionControlNetPipeline, controlnet=net)
    for pipe in (added, built):
        with pytest.raises(PromptError, match=r"call sefi_fast\.attach on the pipeline"):
            draw(pipe, "a <it>", image=HINT)
    expected = draw(built, "a photo of a cat", image=HINT)
    attach(built, make_subject(distance=0))
    torch.testing.assert_close(draw(built, "a photo of a <it>", image=HINT), expected, **CLOSE)


def test_a_controlnet_put_into_the_pipeline_after_attaching(sd15_pipeline, make_subject):
    first, second = (make_controlnet(sd15_pipeline.unet, seed=seed) for seed in (1, 2))
    kind = StableDiffusionControlNetPipeline
    pipe = over_the_same_models(sd15_pipeline, kind, controlnet=first)
    other = over_the_same_models(sd15_pipeline, kind, controlnet=copy.deepcopy(second))
    expected = draw(other, "a photo of a cat", image=HINT)
    attach(pipe, make_subject(distance=0))
    draw(pipe, "a <it>", image=HINT)
    pipe.controlnet = second
    torch.testing.assert_close(draw(pipe, "a photo of a <it>", image=HINT), expected, **CLOSE)


def test_other_tools_that_call_the_text_encoder(attached):
    ids = attached.tokenizer("a photo of <it> and", return_tensors="pt").input_ids
    with torch.no_grad(), pytest.raises(PromptError, match=r"sefi_fast\.encode"):
        attached.text_encoder(ids)
    with torch.no_grad(), pytest.raises(PromptError, match=MISSING):
        attached.text_encoder(input_ids=ids)
    assert encode(attached, "a <it>").isfinite().all()


def test_a_placeholder_in_other_letters(attached):
    with pytest.raises(PromptError, match="exactly as it is"):
        draw(attached, "a <IT>")


def test_words_that_only_look_alike_are_drawn(sd15_pipeline):
    pipe = sd15_pipeline
    attach(pipe, [subject_for(pipe, "sks"), subject_for(pipe, "dog", class_word="dog")])
    other = over_the_same_models(pipe)
    for prompt in ("asks", "sksy", "a dog", "it <"):
        assert draw(other, prompt, num_inference_steps=1).isfinite().all()
    with pytest.raises(PromptError, match="'sks'"):
        draw(other, "a photo of sks")
    # A placeholder that is a class word stands in every encoded prompt of its subject.
    assert draw(pipe, "a dog with sks", num_inference_steps=1).isfinite().all()
    attach(
        pipe,
        [
            subject_for(pipe, "cat", class_word="dog"),
            subject_for(pipe, "<it>", class_word="red cat"),
        ],
    )
    assert draw(pipe, "a <it>", num_inference_steps=1).isfinite().all()


def test_the_second_prompt_of_sdxl(sdxl_pipeline, make_sdxl_subject):
    attach(sdxl_pipeline, make_sdxl_subject())
    other = AutoPipelineForImage2Image.from_pipe(sdxl_pipeline)
    with pytest.raises(PromptError, match=MISSING):
        draw(other, "a dog", prompt_2="a <it>", image=HINT)


def test_the_guard_goes_with_the_last_pipeline(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    other = over_the_same_models(pipe)
    before = state_of(pipe)["text_encoder."]
    attach(pipe, make_subject())
    attach(other, make_subject("<me>", "person"))
    with pytest.raises(PromptError, match="'<me>'"):
        draw(pipe, "a <me>")
    detach(pipe)
    draw(pipe, "a <it>", num_inference_steps=1)
    with pytest.raises(PromptError, match="'<me>'"):
        draw(pipe, "a <me>")
    detach(other)
    assert state_of(pipe)["text_encoder."] == before
    draw(pipe, "a <me>", num_inference_steps=1)


def test_copies_are_watched_by_themselves(attached):
    copied = copy.deepcopy(attached)
    lone = copy.deepcopy(attached.text_encoder)
    detach(attached)
    other = over_the_same_models(copied)
    with pytest.raises(PromptError, match=MISSING):
        draw(other, "a <it>")
    ids = attached.tokenizer("a <it>", return_tensors="pt").input_ids
    with torch.no_grad():
        assert lone(ids)[0].isfinite().all()
    detach(copied)
    assert not copied.text_encoder._forward_pre_hooks
    assert "_sefi_patch" not in vars(copied.text_encoder)


def test_another_text_encoder_put_into_the_pipeline(attached):
    old, new = attached.text_encoder, copy.deepcopy(attached.text_encoder)
    attached.text_encoder = new
    draw(attached, "a <it>", num_inference_steps=1)
    assert not old._forward_pre_hooks and new._forward_pre_hooks
