"""The packed conditioning tensor: every stage and both streams of a prompt in one prompt_embeds.

A packed prompt is [B, S·2·M + 1, C]: stage-major, within a stage the K stream and then the V
stream of M tokens each, and at the end one row of zeros. The zero row makes the length differ from
every multiple of M, so that no plain prompt, long ones included, is taken for a packed one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sefi_fast.conditioning.stages import stage_of


def pack(streams: Tensor) -> Tensor:
    """Streams [B, S, 2, M, C] to the packed prompt [B, S·2·M + 1, C]; differentiable."""
    if streams.dim() != 5 or streams.shape[2] != 2:
        raise ValueError(
            f"streams must be [B, stages, 2, tokens, C], got shape {tuple(streams.shape)}"
        )
    return torch.nn.functional.pad(streams.flatten(1, 3), (0, 0, 0, 1))


def packed_stages(length: int, tokens_per_stream: int) -> int | None:
    """Number of stages of a packed prompt of this length; None for a length that is not packed."""
    # Not divmod, which torch.compile refuses for a length that varies.
    stages, rest = (length - 1) // (2 * tokens_per_stream), (length - 1) % (2 * tokens_per_stream)
    return stages if rest == 0 and stages >= 1 else None


def _stages_or_raise(packed: Tensor, tokens_per_stream: int) -> int:
    stages = packed_stages(packed.shape[1], tokens_per_stream) if packed.dim() == 3 else None
    if stages is None:
        raise ValueError(
            f"a packed prompt is [B, stages·2·{tokens_per_stream} + 1, C], got shape "
            f"{tuple(packed.shape)}; make it with sefi_fast.encode"
        )
    return stages


def unpack(packed: Tensor, tokens_per_stream: int) -> Tensor:
    """The streams [B, S, 2, M, C] of a packed prompt, as a view."""
    stages = _stages_or_raise(packed, tokens_per_stream)
    return packed[:, :-1].unflatten(1, (stages, 2, tokens_per_stream))


def stage_index(
    packed: Tensor, tokens_per_stream: int, timestep: Tensor | float, num_train_timesteps: int
) -> Tensor:
    """Stage of each sample, int64 on the packed prompt's device: [1] or [B].

    Raises:
        ValueError: if there is neither one timestep nor one for each sample.
    """
    stages = _stages_or_raise(packed, tokens_per_stream)
    stage = stage_of(timestep, stages, num_train_timesteps).reshape(-1)
    if stage.shape[0] not in (1, packed.shape[0]):
        raise ValueError(
            f"{stage.shape[0]} timesteps for a batch of {packed.shape[0]} prompts; "
            "give one, or one for each"
        )
    return stage.to(packed.device)


def take_stage(packed: Tensor, tokens_per_stream: int, stage: Tensor) -> Tensor:
    """Rows [B, 2·M, C] of the given stage ([1], or [B] for one a sample) of a packed prompt."""
    stages = _stages_or_raise(packed, tokens_per_stream)
    by_stage = packed[:, :-1].unflatten(1, (stages, 2 * tokens_per_stream))
    if stage.shape[0] == 1:
        return by_stage.index_select(1, stage).squeeze(1)
    return by_stage[torch.arange(packed.shape[0], device=packed.device), stage]


def select_stage(
    packed: Tensor,
    tokens_per_stream: int,
    timestep: Tensor | float,
    num_train_timesteps: int = 1000,
) -> Tensor:
    """K stream and V stream [B, 2·M, C] of the stage that the timestep falls into.

    Args:
        packed: [B, S·2·M + 1, C].
        tokens_per_stream: M.
        timestep: one number or tensor for all samples, or [B] for one a sample; any device.
        num_train_timesteps: T.
    """
    stage = stage_index(packed, tokens_per_stream, timestep, num_train_timesteps)
    return take_stage(packed, tokens_per_stream, stage)
