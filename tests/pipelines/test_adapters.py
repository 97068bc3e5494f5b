"""LoRA and IP-Adapter loaded, scaled and unloaded while subjects are attached."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from pipelines.features import load_ip_adapter, load_lora
from pipelines.sampling import assert_close, assert_differ, both_families, sample, state_of

from sefi_fast import attach, detach, trace
from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.errors import ModelError

EMBEDS = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))
IMAGE = {"ip_adapter_image_embeds": [EMBEDS]}


def cat(pipe, **arguments) -> torch.Tensor:
    return sample(pipe, "a photo of a cat", num_inference_steps=2, **arguments)


def subject(pipe, **arguments) -> torch.Tensor:
    return sample(pipe, "a photo of a <it>", num_inference_steps=2, **arguments)


@both_families
def test_lora_is_loaded_and_unloaded_while_attached(pipe, make_subject):
    pytest.importorskip("peft")
    bare = cat(pipe)
    load_lora(pipe)
    with_lora = cat(pipe)
    assert_differ(with_lora, bare)
    pipe.unload_lora_weights()
    attach(pipe, make_subject(distance=0))
    assert_close(subject(pipe), bare)
    load_lora(pipe)
    assert_close(subject(pipe), with_lora)
    pipe.unload_lora_weights()
    assert_close(subject(pipe), bare)
    detach(pipe)
    assert_close(cat(pipe), bare)


@both_families
def test_lora_is_scaled_and_fused_while_attached(pipe, make_subject):
    pytest.importorskip("peft")
    bare = cat(pipe)
    load_lora(pipe)
    (name,) = pipe.get_list_adapters()["unet"]
    pipe.set_adapters(name, 0.3)
    weak = cat(pipe)
    pipe.set_adapters(name, 1.0)
    strong = cat(pipe)
    attach(pipe, make_subject(distance=0))
    assert_close(subject(pipe), strong)
    pipe.set_adapters(name, 0.3)
    assert_close(subject(pipe), weak)
    pipe.set_adapters(name, 1.0)
    pipe.fuse_lora()
    assert_close(subject(pipe), strong)
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert_close(subject(pipe), bare)


@both_families
def test_streams_and_the_adapters_image_both_reach_a_layer(pipe, make_subject):
    load_ip_adapter(pipe)
    attach(pipe, make_subject())
    calls = []
    layer = next(iter(cross_attention_layers(pipe.unet).values()))
    layer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args[0], kwargs, output)),
        with_kwargs=True,
    )
    subject(pipe, **IMAGE)
    hidden, kwargs, output = calls[0]
    prompt, images = kwargs["encoder_hidden_states"]
    keys, values = prompt.chunk(2, dim=-1)
    assert keys.shape[1] == 77
    assert_differ(keys, values)

    def attend(key, value):
        projected = (layer.to_q(hidden), key, value)
        heads = [x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in projected]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    with torch.no_grad():
        processor, tokens = layer.processor, images[0].flatten(1, -2)
        of_image = attend(processor.to_k_ip[0](tokens), processor.to_v_ip[0](tokens))
        of_prompt = attend(layer.to_k(keys), layer.to_v(values))
        expected = layer.to_out[0](of_prompt + processor.scale[0] * of_image)
    assert_close(output, expected, 1e-4)


@both_families
def test_a_scale_of_an_ip_adapter_set_while_attached_acts_and_stays(pipe, make_subject):
    load_ip_adapter(pipe)
    strong = cat(pipe, **IMAGE)
    before = state_of(pipe)
    attach(pipe, make_subject(distance=0))
    assert state_of(pipe) != before
    detach(pipe)
    assert state_of(pipe) == before
    attach(pipe, make_subject(distance=0))
    pipe.set_ip_adapter_scale(0.1)
    weak = subject(pipe, **IMAGE)
    assert_differ(weak, strong)
    detach(pipe)
    assert_close(cat(pipe, **IMAGE), weak)
    kinds = {type(attn.processor) for attn in cross_attention_layers(pipe.unet).values()}
    assert kinds == {IPAdapterAttnProcessor2_0}


@both_families
def test_an_ip_adapter_is_loaded_and_unloaded_while_attached(pipe, make_subject):
    bare = cat(pipe)
    load_ip_adapter(pipe)
    with_image = cat(pipe, **IMAGE)
    attach(pipe, make_subject(distance=0))
    pipe.unload_ip_adapter()
    assert_close(subject(pipe), bare)
    load_ip_adapter(pipe)
    assert_close(subject(pipe, **IMAGE), with_image)
    copied = copy.deepcopy(pipe)
    detach(pipe)
    assert_close(subject(copied, **IMAGE), with_image)
    copied.set_ip_adapter_scale(0.0)
    assert_close(subject(copied, **IMAGE), bare)


def test_a_trace_next_to_an_ip_adapter_is_refused(pipe):
    load_ip_adapter(pipe)
    with pytest.raises(ModelError, match="belongs to an IP-Adapter"), trace(pipe, "cat"):
        cat(pipe, **IMAGE)
