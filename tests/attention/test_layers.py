"""The cross-attention layers of a U-Net and a ControlNet: order and scale."""

from __future__ import annotations

import torch
from models import make_controlnet, make_unet

from sefi_fast.attention.layers import cross_attention_layers, layer_resolutions

WIDTH = 24


def test_layers_are_listed_in_order_of_execution_with_their_scale():
    unet = make_unet(WIDTH)
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
