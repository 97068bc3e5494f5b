"""Training on a U-Net that others use meanwhile."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from pipelines.sampling import sample, subject_for
from training.shared import FAST, random_image

import sefi_fast
from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.errors import ModelError

FAST = {**FAST, "class_word": "cat", "steps": 2}


def train(pipe):
    return sefi_fast.train(random_image(0), model=pipe, **FAST)


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
    alone = train(pipe)
    drawn = []
    meanwhile(
        pipe, lambda: drawn.extend((sample(plain, None, **given), sample(attached, "a <it>")))
    )
    together = train(pipe)
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
    alone = train(pipe)
    drawn = []
    with ExitStack() as stack:

        def overlap():
            if first == "training":
                stack.enter_context(watch(other, wanted))
            drawn.append(sample(other, "a cat", num_inference_steps=1))
            if first == "watching":
                stack.close()

        if first == "watching":
            stack.enter_context(watch(other, wanted))
        meanwhile(pipe, overlap)
        together = train(pipe)
    torch.testing.assert_close(drawn[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(together.tokens[0], alone.tokens[0])
    assert dict(pipe.unet.attn_processors) == before


def test_two_trainings_of_one_unet_at_a_time_are_refused(sd15_pipeline):
    pipe = sd15_pipeline
    before = dict(pipe.unet.attn_processors)

    def train_too():
        with pytest.raises(ModelError, match="another thread trains on this U-Net"):
            train(pipe)

    alone = train(pipe)
    meanwhile(pipe, train_too)
    assert torch.equal(train(pipe).tokens[0], alone.tokens[0])
    assert dict(pipe.unet.attn_processors) == before


def test_a_processor_that_training_refuses_is_replaced_as_the_message_says(sd15_pipeline):
    class Foreign(AttnProcessor):
        pass

    sd15_pipeline.unet.set_attn_processor(Foreign())
    with pytest.raises(ModelError, match=r"unet\.set_attn_processor\(AttnProcessor2_0\(\)\)"):
        train(sd15_pipeline)
    sd15_pipeline.unet.set_attn_processor(AttnProcessor2_0())
    train(sd15_pipeline)
