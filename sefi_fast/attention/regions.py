"""Prompts of single regions, and the image tokens that attend to them (docs/method.md §4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sefi_fast.attention.layers import cross_attention_layers, layer_resolutions, reduced_size
from sefi_fast.errors import ModelError

Box: TypeAlias = "tuple[float, float, float, float]"
"""(left, top, right, bottom) in fractions of the image."""


@dataclass(frozen=True, eq=False)
class RegionPrompts:
    """The regions' prompts of one call of a model; they travel in the `PromptState` of its prompt.

    Attributes:
        streams: K and V streams [1, M, 2·C] of the call's stage, or a plain prompt [1, M, C], one
            tensor a region.
        boxes: one box a region; where two overlap the later one counts.
        samples: number of samples, the last of the batch, that have regions. Those before them
            belong to the negative prompt.
        size: (height, width) of the model's input.
        factors: id of a cross-attention layer → its down factor relative to that input.
        reached: ids of the layers that used their regions.
    """

    streams: Sequence[Tensor]
    boxes: Sequence[Box]
    samples: int
    size: tuple[int, int]
    factors: Mapping[int, int]
    reached: set[int] = field(default_factory=set)

    def of(self, attn: Attention, query: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the prompt of each region and the int64 [n] indices of its image tokens.

        An image token belongs to a box that holds its centre. A region too small to hold one is
        left out. The query is [B, heads, N, head_dim], of N image tokens.
        """
        height, width = reduced_size(self.size, self.factors[id(attn)])
        if query.shape[2] != height * width:
            raise ModelError(
                f"a cross-attention layer got {query.shape[2]} image tokens instead of "
                f"{height}×{width}. Regions need every image token in its place. Turn off what "
                "merges, tiles or shrinks them (token merging, HyperTile, deep shrink)."
            )
        self.reached.add(id(attn))
        for prompt, box in zip(self.streams, self.boxes, strict=True):
            places = _places(height, width, box, query.device)
            if len(places):
                yield prompt, places


def down_factors(model: nn.Module) -> dict[int, int]:
    """Return id → down factor of each cross-attention layer of a U-Net or ControlNet."""
    factors = layer_resolutions(model)
    return {id(attn): factors[name] for name, attn in cross_attention_layers(model).items()}


# Layers of one size share the indices, at every step.
@lru_cache(maxsize=256)
def _places(height: int, width: int, box: Box, device: torch.device) -> Tensor:
    left, top, right, bottom = box
    rows = [row for row in range(height) if top <= (row + 0.5) / height < bottom]
    columns = [column for column in range(width) if left <= (column + 0.5) / width < right]
    places = [row * width + column for row in rows for column in columns]
    # Also calls with gradients may use them.
    with torch.inference_mode(False):
        return torch.tensor(places, dtype=torch.int64, device=device)
