"""Processors, projections, LoRA and IP-Adapters changed while subjects are attached."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from pipelines.features import load_ip_adapter, load_lora
from pipelines.sampling import assert_close, assert_differ, both_families, hooks_on, sample

from sefi_fast import attach, detach, trace
from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.attention.processor import SeFiAttnProcessor
from sefi_fast.errors import ModelError

EMBEDS = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))
IMAGE = {"ip_adapter_image_embeds": [EMBEDS]}


class Foreign(AttnProcessor):
    """A class that diffusers does not know."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def unfuse(pipe):
    pipe.unet.fuse_qkv_projections()
    pipe.unet.unfuse_qkv_projections()


def load_lora_and_unload(pipe):
    pytest.importorskip("peft")
    load_lora(pipe)
    pipe.unload_lora_weights()


def remove_hooks(pipe):
    for module in pipe.unet.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()


WITHOUT_EFFECT = {
    "default processors": lambda pipe: pipe.unet.set_default_attn_processor(),
    "one processor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    "a dictionary": lambda pipe: pipe.unet.set_attn_processor(
        {name: AttnProcessor() for name in pipe.unet.attn_processors}
    ),
    "a processor of the user": lambda pipe: pipe.unet.set_attn_processor(Foreign()),
    "our processor": lambda pipe: pipe.unet.set_attn_processor(SeFiAttnProcessor(backend="eager")),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "fused projections": lambda pipe: pipe.unet.fuse_qkv_projections(),
    "unfused projections": unfuse,
    "LoRA loaded and unloaded": load_lora_and_unload,
    "hooks removed": remove_hooks,
}
BETWEEN_STEPS = ["default processors", "attention slicing", "LoRA loaded and unloaded"]


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_changes_without_effect_on_the_image(pipe, make_subject, name):
    change = WITHOUT_EFFECT[name]
    attach(pipe, make_subject())
    expected = sample(pipe, "a <it>")
    if name in BETWEEN_STEPS:

        def callback(pipe, step, timestep, tensors):
            change(pipe)
            return tensors

        assert_close(sample(pipe, "a <it>", callback_on_step_end=callback), expected)
    change(pipe)
    assert_close(sample(pipe, "a <it>"), expected)
    chosen = dict(pipe.unet.attn_processors)
    detach(pipe)
    assert dict(pipe.unet.attn_processors) == chosen
    assert not hooks_on(pipe)


def set_lora_scale(scale):
    return lambda pipe: pipe.set_adapters(pipe.get_list_adapters()["unet"], scale)


ADAPTERS = {
    "LoRA": [
        load_lora,
        set_lora_scale(0.3),
        set_lora_scale(1.0),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ],
    "IP-Adapter": [
        load_ip_adapter,
        lambda pipe: pipe.set_ip_adapter_scale(0.1),
        lambda pipe: pipe.unload_ip_adapter(),
        load_ip_adapter,
    ],
}


@both_families
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_act_as_in_the_bare_pipeline(pipe, make_subject, name):
    if name == "LoRA":
        pytest.importorskip("peft")

    def run(pipe, word):
        image = IMAGE if pipe.unet.encoder_hid_proj is not None else {}
        return sample(pipe, f"a photo of a {word}", num_inference_steps=2, **image)

    bare, copies = copy.deepcopy(pipe), []
    attach(pipe, make_subject(distance=0))
    images = [run(bare, "cat")]
    for change in ADAPTERS[name]:
        change(bare)
        change(pipe)
        images.append(run(bare, "cat"))
        assert_close(run(pipe, "<it>"), images[-1])
        copies = copies or [copy.deepcopy(pipe)]
    assert_differ(images[1], images[0])
    assert_differ(images[2], images[1])
    detach(pipe)
    assert torch.equal(run(pipe, "cat"), images[-1])
    assert_close(run(*copies, "<it>"), images[1])


@both_families
def test_streams_and_the_image_of_an_ip_adapter_both_reach_a_layer(pipe, make_subject):
    load_ip_adapter(pipe)
    attach(pipe, make_subject())
    calls = []
    layer = next(iter(cross_attention_layers(pipe.unet).values()))
    layer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args[0], kwargs, output)),
        with_kwargs=True,
    )
    sample(pipe, "a <it>", num_inference_steps=1, **IMAGE)
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


def test_a_trace_next_to_an_ip_adapter_is_refused(pipe):
    load_ip_adapter(pipe)
    with pytest.raises(ModelError, match="belongs to an IP-Adapter"), trace(pipe, "cat"):
        sample(pipe, "a cat", **IMAGE)
