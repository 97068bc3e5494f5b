"""The plan of the forward kernel: from layouts of tensors to a launch, found once and kept."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tiling
from .configs import KernelConfig
from .forward import cross_attention_forward
from .launch import Device, Launch, Prepared
from .layouts import InputLayouts, Inputs, row_alignment


@tiling.kept
def _prepare_forward(
    inputs: InputLayouts, scale: float, device: Device, config: KernelConfig | None
) -> Prepared:
    tiles = tiling.tiles_of("forward", inputs, device)
    config = config or tiling.config_of(
        "forward", inputs, tiles, device, pipeline=inputs.map_tokens is None
    )
    programs, blocks = tiling.split_rows(inputs, config, device)
    batch, heads, _, head_dim = inputs.query.shape
    numbers = tiling.common_numbers(inputs, tiles, scale) | {
        "blocks_a_program": blocks,
        "BLOCK": config.block,
        "RELOAD": config.reload,
        "ALIGNMENT": row_alignment(head_dim, *inputs[:4]),
        "UPCAST": device.interpreted and inputs.query.dtype == torch.bfloat16,
    }
    return Prepared(cross_attention_forward, (batch * heads, programs), numbers, config)


def plan_forward(
    inputs: Inputs, output: Tensor, maps: Tensor | None, scale: float, device: Device,
    config: KernelConfig | None = None,
) -> tuple[Launch, Tensor | None]:  # fmt: skip
    """The forward launch, and the partial alignments [B, H, programs] it will write, if any.

    output is [B, N, H, D] contiguous, maps [B, H, T, N] contiguous float32 or None. config stands
    in for the table's, here and below.
    """
    prepared = _prepare_forward(InputLayouts.of(inputs), scale, device, config)
    partials = None
    if inputs.reference_key is not None:
        batch, heads = inputs.query.shape[:2]
        partials = output.new_empty((batch, heads, prepared.grid[1]), dtype=torch.float32)
    tensors = inputs._asdict() | {"output": output, "alignment": partials, "maps": maps}
    return Launch(prepared, tensors), partials
