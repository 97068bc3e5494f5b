"""ControlNet pipelines: every ControlNet gets the stage and the streams of the U-Net."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
)
from models import make_controlnet
from pipelines.sampling import sample, state_of
from torch import nn

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.errors import ModelError
from sefi_fast.pipelines import attach, detach
from sefi_fast.prompts import encode, unpack
from sefi_fast.prompts.stages import stage_of

CLOSE = {"rtol": 0, "atol": 2e-4}
HINT = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(9))


@pytest.fixture(params=["one", "two", "img2img"])
def controlled(request, sd15_pipeline):
    unet = sd15_pipeline.unet
    controlnet = make_controlnet(unet, seed=1)
    arguments = {"image": HINT}
    pipeline_class = StableDiffusionControlNetPipeline
    if request.param == "two":
        controlnet = MultiControlNetModel([controlnet, make_controlnet(unet, seed=2)])
        arguments = {"image": [HINT, 1 - HINT]}
    elif request.param == "img2img":
        pipeline_class = StableDiffusionControlNetImg2ImgPipeline
        arguments |= {"control_image": 1 - HINT}
    pipe = pipeline_class(
        **sd15_pipeline.components, controlnet=controlnet, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments


def test_controlnets_follow_the_subject_until_it_is_detached(controlled, make_subject):
    pipe, arguments = controlled
    cat = sample(pipe, "a photo of a cat", **arguments)
    dog = sample(pipe, "a photo of a dog", **arguments)
    before = state_of(pipe)
    attach(pipe, make_subject(distance=0))
    torch.testing.assert_close(sample(pipe, "a photo of a <it>", **arguments), cat, **CLOSE)
    torch.testing.assert_close(sample(pipe, "a photo of a dog", **arguments), dog, **CLOSE)
    attach(pipe, make_subject())
    assert (sample(pipe, "a photo of a <it>", **arguments) - cat).abs().max() > 1e-2
    detach(pipe)
    assert state_of(pipe) | {"pipe": None} == before | {"pipe": None}
    assert torch.equal(sample(pipe, "a photo of a dog", **arguments), dog)


@pytest.mark.parametrize("controlled", ["one", "img2img"], indirect=True)
@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_controlnet_attends_to_the_streams_of_the_stage(controlled, make_subject, guess_mode):
    pipe, arguments = controlled
    attach(pipe, make_subject())
    want = unpack(encode(pipe, "a <it>"), 48)
    seen, timesteps = [], []
    layer = next(iter(cross_attention_layers(pipe.controlnet).values()))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    pipe.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: timesteps.append(args[1]), with_kwargs=True
    )
    sample(pipe, "a <it>", guess_mode=guess_mode, **arguments)
    assert len(seen) == len(timesteps) >= 3
    for streams, timestep in zip(seen, timesteps, strict=True):
        stage = int(stage_of(timestep, 5))
        assert len(streams) == (1 if guess_mode else 2)
        torch.testing.assert_close(streams[-1], torch.cat([*want[0, stage]], -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("controlled", ["two"], indirect=True)
def test_other_control_models_are_refused(controlled, make_subject):
    pipe, _ = controlled
    pipe.controlnet.nets[1] = nn.Identity()
    before = state_of(pipe)
    with pytest.raises(ModelError, match="ControlNet of type Identity"):
        attach(pipe, make_subject())
    assert state_of(pipe) == before
