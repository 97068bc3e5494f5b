"""IP-Adapter beside a subject, whichever came first, with scales and masks that still act."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from pipelines.features import load_ip_adapter
from pipelines.sampling import draw, state_of, subject_for

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.errors import ModelError
from sefi_fast.pipelines import attach, detach, trace

CLOSE = {"rtol": 0, "atol": 1e-3}
EMBEDS = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))
PICTURE = {"ip_adapter_image_embeds": [EMBEDS], "num_inference_steps": 2}


@pytest.fixture(params=["sd15_pipeline", "sdxl_pipeline"])
def pipe(request):
    return request.getfixturevalue(request.param)


def test_streams_and_picture_both_reach_each_layer(pipe):
    load_ip_adapter(pipe)
    subject = subject_for(pipe)
    attach(pipe, subject)
    seen = []
    layer = next(iter(cross_attention_layers(pipe.unet).values()))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    outputs = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    draw(pipe, "a <it>", **PICTURE)
    (hidden, *_), kwargs = seen[0]
    prompt, picture = kwargs["encoder_hidden_states"]
    keys, values = prompt.chunk(2, dim=-1)
    assert keys.shape[1] == 77 and (keys - values).abs().max() > 1e-2
    original = layer.processor.__dict__

    def heads(x):
        return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    def attend(key, value):
        query = heads(layer.to_q(hidden))
        found = torch.nn.functional.scaled_dot_product_attention(query, heads(key), heads(value))
        return found.transpose(1, 2).flatten(2)

    with torch.no_grad():
        images = picture[0].flatten(1, 2) if picture[0].ndim == 4 else picture[0]
        expected = attend(layer.to_k(keys), layer.to_v(values))
        modules = original["_modules"]
        expected = expected + original["scale"][0] * attend(
            modules["to_k_ip"][0](images), modules["to_v_ip"][0](images)
        )
        expected = layer.to_out[0](expected)
    torch.testing.assert_close(outputs[0], expected, rtol=0, atol=1e-4)


def test_a_scale_set_while_attached_acts_and_stays(pipe):
    load_ip_adapter(pipe)
    strong = draw(pipe, "a photo of a cat", **PICTURE)
    attach(pipe, subject_for(pipe, distance=0))
    pipe.set_ip_adapter_scale(0.1)
    weak = draw(pipe, "a photo of a <it>", **PICTURE)
    assert (weak - strong).abs().max() > 1e-2
    detach(pipe)
    torch.testing.assert_close(draw(pipe, "a photo of a cat", **PICTURE), weak, **CLOSE)
    kinds = {type(attn.processor) for attn in cross_attention_layers(pipe.unet).values()}
    assert kinds == {IPAdapterAttnProcessor2_0}


def test_loading_and_unloading_while_attached(pipe):
    bare = draw(pipe, "a photo of a cat", num_inference_steps=2)
    load_ip_adapter(pipe)
    with_picture = draw(pipe, "a photo of a cat", **PICTURE)
    attach(pipe, subject_for(pipe, distance=0))
    pipe.unload_ip_adapter()
    actual = draw(pipe, "a photo of a <it>", num_inference_steps=2)
    torch.testing.assert_close(actual, bare, **CLOSE)
    load_ip_adapter(pipe)
    torch.testing.assert_close(draw(pipe, "a photo of a <it>", **PICTURE), with_picture, **CLOSE)
    copied = copy.deepcopy(pipe)
    detach(pipe)
    torch.testing.assert_close(draw(copied, "a photo of a <it>", **PICTURE), with_picture, **CLOSE)
    copied.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(draw(copied, "a photo of a <it>", **PICTURE), bare, **CLOSE)


def test_detach_puts_the_very_processors_back(sd15_pipeline):
    load_ip_adapter(sd15_pipeline)
    before = state_of(sd15_pipeline)
    attach(sd15_pipeline, subject_for(sd15_pipeline))
    assert state_of(sd15_pipeline) != before
    detach(sd15_pipeline)
    assert state_of(sd15_pipeline) == before


def test_maps_are_refused_in_words(sd15_pipeline):
    load_ip_adapter(sd15_pipeline)
    with (
        pytest.raises(ModelError, match="belongs to an IP-Adapter"),
        trace(sd15_pipeline, "cat"),
    ):
        draw(sd15_pipeline, "a cat", **PICTURE)
