"""Find the cross-attention layers of a U-Net or a ControlNet and the scale each works at."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn


def cross_attention_layers(model: nn.Module) -> dict[str, Attention]:
    """Return name → cross-attention layer of a U-Net or ControlNet, in order of execution."""
    layers: dict[str, Attention] = {}
    # The U-Net registers its up blocks before the middle one, so module order is not call order.
    for part in ("down_blocks", "mid_block", "up_blocks"):
        block = getattr(model, part, None)
        if block is None:
            continue
        for name, module in block.named_modules(prefix=part):
            if isinstance(module, Attention) and module.is_cross_attention:
                layers[name] = module
    return layers


def layer_resolutions(model: nn.Module) -> dict[str, int]:
    """Return name → down factor (1, 2, 4, 8 …) of each cross-attention layer.

    `reduced_size` gives the image tokens of a layer from its factor and the size of the latent.
    """
    factors: dict[str, int] = {}
    factor = 1
    down_blocks: Any = model.down_blocks
    for index, block in enumerate(down_blocks):
        factors[f"down_blocks.{index}"] = factor
        if getattr(block, "downsamplers", None) is not None:
            factor *= 2
    factors["mid_block"] = factor
    for index, block in enumerate(getattr(model, "up_blocks", [])):
        factors[f"up_blocks.{index}"] = factor
        if getattr(block, "upsamplers", None) is not None:
            factor //= 2
    layers = cross_attention_layers(model)
    return {
        name: next(f for b, f in factors.items() if name.startswith(f"{b}.")) for name in layers
    }


def reduced_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return (height, width) of a layer's image tokens for a latent of `size`, rounded up."""
    height, width = size
    return -(-height // factor), -(-width // factor)
