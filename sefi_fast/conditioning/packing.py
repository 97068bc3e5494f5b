"""The packed conditioning tensor: every stage and both streams of a prompt in one prompt_embeds.

A packed prompt is [B, M, S·(2·C + 1)]. The row of a token holds, stage by stage, its C numbers of
the K stream, its C numbers of the V stream and one zero. A model of width C takes no plain prompt
that wide, so the width alone tells packed from plain, whatever the values and the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sefi_fast.conditioning.stages import stage_of


def pack(streams: Tensor) -> Tensor:
    """Streams [B, S, 2, M, C] to the packed prompt [B, M, S·(2·C + 1)]; differentiable."""
    if streams.dim() != 5 or streams.shape[2] != 2:
        raise ValueError(
            f"streams must be [B, stages, 2, tokens, C], got shape {tuple(streams.shape)}"
        )
    by_token = streams.permute(0, 3, 1, 2, 4).flatten(3)
    return torch.nn.functional.pad(by_token, (0, 1)).flatten(2)


def packed_stages(columns: int, width: int) -> int | None:
    """Return the stages of a packed prompt with so many columns, or None for one not packed.

    Args:
        columns: size of the prompt's last dimension.
        width: C, columns of a plain prompt of this model.
    """
    # Not divmod, which torch.compile refuses for a size that varies.
    stages, rest = columns // (2 * width + 1), columns % (2 * width + 1)
    return stages if rest == 0 and stages >= 1 else None


def unpack(packed: Tensor, width: int) -> Tensor:
    """Return the streams [B, S, 2, M, C] of a packed prompt for a model of width C, as a view.

    Raises:
        ValueError: the prompt is not packed for this width.
    """
    stages = packed_stages(packed.shape[-1], width) if packed.dim() == 3 else None
    if stages is None:
        raise ValueError(
            f"prompt_embeds have the shape {tuple(packed.shape)}. This model takes [B, M, {width}],"
            f" or packed [B, M, stages·{2 * width + 1}]. Make packed ones with sefi_fast.encode "
            "for this pipeline."
        )
    by_stage = packed.unflatten(2, (stages, 2 * width + 1))[..., :-1]
    return by_stage.unflatten(3, (2, width)).permute(0, 2, 3, 1, 4)


def select_stage(
    packed: Tensor, width: int, timestep: Tensor | float, num_train_timesteps: int = 1000
) -> Tensor:
    """K stream and V stream side by side, [B, M, 2·C], of the stage that the timestep falls into.

    Args:
        packed: [B, M, S·(2·C + 1)].
        width: C.
        timestep: one number or tensor for all samples, or [B] for one a sample; any device.
        num_train_timesteps: T.

    Raises:
        ValueError: the prompt is not packed for this width, or there is neither one timestep nor
            one for each sample.
    """
    streams = unpack(packed, width)
    stage = stage_of(timestep, streams.shape[1], num_train_timesteps).reshape(-1)
    if stage.shape[0] not in (1, packed.shape[0]):
        raise ValueError(
            f"{stage.shape[0]} timesteps for a batch of {packed.shape[0]} prompts; "
            "give one, or one for each"
        )
    stage = stage.to(packed.device)
    if stage.shape[0] == 1:
        chosen = streams.index_select(1, stage).squeeze(1)
    else:
        chosen = streams[torch.arange(packed.shape[0], device=packed.device), stage]
    return chosen.transpose(1, 2).flatten(2)
