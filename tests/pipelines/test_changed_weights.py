"""Weights that change between the steps of a call act as they do in the bare pipeline."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import accelerate
import pytest
import torch
from pipelines.features import load_lora
from pipelines.sampling import sample, subject_for
from torch import nn
from torch.nn.utils import parametrize

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.pipelines import attach

SHORT = {"num_inference_steps": 3, "height": 64, "width": 64}


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.5


def each_projection(change):
    """Return a change of every layer that projects the prompt to keys or values."""

    def change_all(pipe):
        for attn in cross_attention_layers(pipe.unet).values():
            for projection in (attn.to_k, attn.to_v):
                change(projection)

    return change_all


@torch.no_grad()
def set_storage(projection):
    projection.weight.set_(projection.weight * 1.5)


scale_data = each_projection(lambda projection: projection.weight.data.mul_(1.5))


def assign_state(pipe):
    state = {name: value * 1.3 for name, value in pipe.unet.state_dict().items()}
    pipe.unet.load_state_dict(state, assign=True)


def offload(pipe):
    scale_data(pipe)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def fuse_lora(pipe):
    load_lora(pipe)
    pipe.fuse_lora()


WAYS = {
    "scale data": scale_data,
    "set storage": each_projection(set_storage),
    "assign a state": assign_state,
    "parametrize": each_projection(
        lambda projection: parametrize.register_parametrization(projection, "weight", Scaled())
    ),
    "change the dtype": lambda pipe: pipe.unet.to(torch.float8_e4m3fn).to(torch.float32),
    "offload": offload,
    "fuse a LoRA": fuse_lora,
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_changed_between_steps(sd15_pipeline, way):
    if "LoRA" in way and find_spec("peft") is None:
        pytest.skip("peft is missing")

    def after_the_first_step(pipe, step, timestep, tensors):
        if step == 0:
            WAYS[way](pipe)
        return tensors

    def changed(pipe, prompt):
        return sample(pipe, prompt, callback_on_step_end=after_the_first_step, **SHORT)

    prompt = "a photo of a cat"
    expected = changed(copy.deepcopy(sd15_pipeline), prompt)
    assert (expected - sample(sd15_pipeline, prompt, **SHORT)).abs().max() > 1e-3
    attach(sd15_pipeline, subject_for(sd15_pipeline, distance=0))
    actual = changed(sd15_pipeline, "a photo of a <it>")
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)


def test_nothing_of_a_call_stays_on_its_prompt(sd15_pipeline):
    pipe = attach(sd15_pipeline, subject_for(sd15_pipeline))
    embeds = pipe.encode_prompt("a <it>", torch.device("cpu"), 1, False)[0].detach()
    pipe.unet(torch.zeros(1, 4, 16, 16), 500, embeds)
    assert not vars(embeds)
