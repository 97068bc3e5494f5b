"""The cross-attention layers of a U-Net and a ControlNet: order, scale and processors."""

from __future__ import annotations

import pytest
import torch
from models import make_controlnet, make_unet

from sefi_fast.attention import SeFiAttnProcessor
from sefi_fast.attention.layers import cross_attention_layers, layer_resolutions

WIDTH = 24


@pytest.fixture
def unet():
    return make_unet(WIDTH)


def test_layers_are_listed_in_order_of_execution_with_their_scale(unet):
    called, lengths = [], {}
    for name, module in unet.named_modules():
        if name.endswith("attn2"):

            def note(module, args, kwargs, name=name):
                called.append(name)
                lengths[name] = args[0].shape[1]

            module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        unet(torch.randn(1, 4, 24, 16), 420, torch.randn(1, 7, WIDTH))
    assert list(cross_attention_layers(unet)) == called
    factors = layer_resolutions(unet)
    assert list(factors) == called
    for name, factor in factors.items():
        assert lengths[name] == -(-24 // factor) * -(-16 // factor)
    assert set(factors.values()) == {1, 2, 4, 8}
    controlnet = make_controlnet(unet)
    assert list(cross_attention_layers(controlnet)) == [n for n in called if "up_blocks" not in n]
    assert set(layer_resolutions(controlnet)) == set(cross_attention_layers(controlnet))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_processor_drops_into_a_whole_unet(unet, dtype):
    unet = unet.to(dtype)
    inputs = (
        torch.randn(2, 4, 16, 16, dtype=dtype),
        torch.tensor(420),
        torch.randn(2, 7, WIDTH, dtype=dtype),
    )
    expected = unet(*inputs).sample
    scale = float(expected.float().abs().max())
    tight, loose = (1e-6, 1e-5) if dtype == torch.float32 else (2**-6, 2**-5)
    for backend, tolerance in ((None, tight), ("eager", loose)):
        unet.set_attn_processor(SeFiAttnProcessor(backend=backend))
        actual = unet(*inputs).sample
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
