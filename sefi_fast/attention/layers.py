"""Find the cross-attention layers of a U-Net or a ControlNet and the scale each works at."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn


def cross_attention_layers(model: nn.Module) -> dict[str, Attention]:
    """Name → cross-attention layer of a U-Net or ControlNet, in order of execution.

    Args:
        model: a UNet2DConditionModel or a ControlNetModel.
    """
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
    """Name → down factor (1, 2, 4, 8 …) of each cross-attention layer relative to the latent.

    Beside `reduced_size` they tell the image tokens that a layer works on.
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
    return {name: factors[_block_name(name)] for name in cross_attention_layers(model)}


def reduced_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """(height, width) of the image tokens of a layer of that down factor, for a latent of `size`.

    Halved again and again, each time rounded up: ceil(height / factor) × ceil(width / factor).
    """
    height, width = size
    return -(-height // factor), -(-width // factor)


def call_argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    """An argument of a U-Net's or ControlNet's call, as its hooks see it: in order or by name."""
    return args[place] if len(args) > place else kwargs[name]


def _block_name(layer_name: str) -> str:
    first, second, *_ = layer_name.split(".")
    return first if first == "mid_block" else f"{first}.{second}"
