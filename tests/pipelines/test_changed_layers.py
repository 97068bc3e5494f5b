"""Processors, projections and adapters changed while subjects are attached."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from pipelines.features import load_ip_adapter, load_lora
from pipelines.sampling import assert_close, assert_differ, both_families, hooks_on, sample

from sefi_fast import attach, detach, trace
from sefi_fast.attention.processor import SeFiAttnProcessor
from sefi_fast.errors import ModelError

EMBEDS = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))


def run(pipe, word="<it>", **arguments):
    if pipe.unet.encoder_hid_proj is not None:
        arguments["ip_adapter_image_embeds"] = [EMBEDS]
    return sample(pipe, f"a photo of a {word}", **arguments)


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


def load_ip_adapter_of_scale_0(pipe):
    load_ip_adapter(pipe)
    pipe.set_ip_adapter_scale(0.0)


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
    "IP-Adapter of scale 0": load_ip_adapter_of_scale_0,
    "hooks removed": remove_hooks,
}
BETWEEN_STEPS = ["default processors", "attention slicing", "LoRA loaded and unloaded"]


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_changes_without_effect_on_the_image(pipe, make_subject, name):
    change = WITHOUT_EFFECT[name]
    attach(pipe, make_subject())
    expected = run(pipe)
    if name in BETWEEN_STEPS:

        def callback(pipe, step, timestep, tensors):
            change(pipe)
            return tensors

        assert_close(run(pipe, callback_on_step_end=callback), expected)
    change(pipe)
    assert_close(run(pipe), expected)
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

    bare, copies = copy.deepcopy(pipe), []
    attach(pipe, make_subject(distance=0))
    images = [run(bare, "cat")]
    for change in ADAPTERS[name]:
        change(bare)
        change(pipe)
        images.append(run(bare, "cat"))
        assert_close(run(pipe), images[-1])
        copies = copies or [copy.deepcopy(pipe)]
    assert_differ(images[1], images[0])
    assert_differ(images[2], images[1])
    detach(pipe)
    assert torch.equal(run(pipe, "cat"), images[-1])
    assert_close(run(*copies), images[1])


def test_a_trace_next_to_an_ip_adapter_is_refused(pipe):
    load_ip_adapter(pipe)
    with pytest.raises(ModelError, match="belongs to an IP-Adapter"), trace(pipe, "cat"):
        run(pipe, "cat")


def test_a_pipeline_is_copied_after_an_adapter_has_come_and_gone(pipe, make_subject):
    attach(pipe, make_subject())
    load_lora(pipe)
    sample(pipe, "a <it>", num_inference_steps=1)
    pipe.unload_lora_weights()
    assert_close(sample(copy.deepcopy(pipe), "a <it>"), sample(pipe, "a <it>"))
