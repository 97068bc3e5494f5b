"""Training on a U-Net that others use meanwhile."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image
from pipelines.sampling import sample, subject_for

import sefi_fast
from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.errors import ModelError

PICTURE = Image.linear_gradient("L").convert("RGB")
FAST = {"class_word": "cat", "steps": 2, "batch_size": 2, "resolution": 64, "progress": False}


def meanwhile(pipe, action):
    """Do something once in the middle of the next call of the U-Net."""
    layer = list(cross_attention_layers(pipe.unet).values())[2]

    def act(module, args):
        handle.remove()
        action()

    handle = layer.register_forward_pre_hook(act)


@pytest.mark.parametrize("tokens", [77, 154])
def test_plain_and_attached_pipelines_generate_while_another_trains(sd15_pipeline, tokens):
    pipe = sd15_pipeline
    plain, attached = (
        StableDiffusionPipeline(**pipe.components, requires_safety_checker=False) for _ in range(2)
    )
    sefi_fast.attach(attached, subject_for(pipe))
    prompt = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(0))
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": prompt.flip(1)}
    expected = sample(plain, None, **given), sample(attached, "a <it>")
    alone = sefi_fast.train(PICTURE, model=pipe, **FAST)
    drawn = []
    meanwhile(
        pipe, lambda: drawn.extend((sample(plain, None, **given), sample(attached, "a <it>")))
    )
    together = sefi_fast.train(PICTURE, model=pipe, **FAST)
    assert len(drawn) == 2
    for actual, wanted in zip(drawn, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    assert torch.equal(together.tokens[0], alone.tokens[0])


@pytest.mark.parametrize("watch", [sefi_fast.trace, sefi_fast.regions])
@pytest.mark.parametrize("first", ["training", "watching"])
def test_a_trace_or_regions_overlap_a_step_of_training(sd15_pipeline, watch, first):
    pipe = sd15_pipeline
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    before = dict(pipe.unet.attn_processors)
    wanted = "cat" if watch is sefi_fast.trace else {"a cat": (0, 0, 0.5, 1)}
    with watch(other, wanted):
        expected = sample(other, "a cat", num_inference_steps=1)
    alone = sefi_fast.train(PICTURE, model=pipe, **FAST)
    drawn = []
    with ExitStack() as stack:
        if first == "watching":
            stack.enter_context(watch(other, wanted))

        def overlap():
            if first == "training":
                stack.enter_context(watch(other, wanted))
            drawn.append(sample(other, "a cat", num_inference_steps=1))
            if first == "watching":
                stack.close()

        meanwhile(pipe, overlap)
        together = sefi_fast.train(PICTURE, model=pipe, **FAST)
    torch.testing.assert_close(drawn[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(together.tokens[0], alone.tokens[0])
    assert dict(pipe.unet.attn_processors) == before


def test_two_trainings_of_one_unet_at_a_time_are_refused(sd15_pipeline):
    pipe = sd15_pipeline
    before = dict(pipe.unet.attn_processors)

    def train_too():
        with pytest.raises(ModelError, match="another thread trains on this U-Net"):
            sefi_fast.train(PICTURE, model=pipe, **FAST)

    alone = sefi_fast.train(PICTURE, model=pipe, **FAST)
    meanwhile(pipe, train_too)
    assert torch.equal(sefi_fast.train(PICTURE, model=pipe, **FAST).tokens[0], alone.tokens[0])
    assert dict(pipe.unet.attn_processors) == before


def test_a_processor_that_training_refuses_is_replaced_as_the_message_says(sd15_pipeline):
    class Foreign(AttnProcessor):
        pass

    sd15_pipeline.unet.set_attn_processor(Foreign())
    with pytest.raises(ModelError, match=r"unet\.set_attn_processor\(AttnProcessor2_0\(\)\)"):
        sefi_fast.train(PICTURE, model=sd15_pipeline, **FAST)
    sd15_pipeline.unet.set_attn_processor(AttnProcessor2_0())
    sefi_fast.train(PICTURE, model=sd15_pipeline, **FAST)
