"""Packed prompts: one K and one V stream for each stage of the denoising."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def stage_of(timestep: Tensor | float, stages: int, num_train_timesteps: int = 1000) -> Tensor:
    """``clamp(floor(t·S/T), 0, S−1)`` as int64 (docs/method.md §1), of the timestep's shape.

    Timesteps may be fractional (Karras-type schedulers). Nothing is read back from the device.

    Args:
        timestep: t, 0 = clean; a number, or a tensor of any shape, dtype and device.
        stages: S, at least 1.
        num_train_timesteps: T of the scheduler the model was trained with.
    """
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
    if not isinstance(timestep, Tensor):
        timestep = torch.tensor(timestep)
    if timestep.is_floating_point():
        # Half precision cannot tell t·S apart from its neighbours.
        wide = timestep if timestep.dtype == torch.float64 else timestep.to(torch.float32)
        stage = torch.floor(wide * stages / num_train_timesteps).to(torch.int64)
    else:
        stage = (timestep.to(torch.int64) * stages).div(num_train_timesteps, rounding_mode="floor")
    return stage.clamp(0, stages - 1)


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


class _PooledInput(NamedTuple):
    """The input of SDXL's added embedding: `width` numbers, `time_width` of them for a time id."""

    width: int
    time_width: int


class StageHook:
    """Replaces a packed prompt by the K and V stream of one stage, side by side: [B, M, 2·C].

    The stage is that of the call's timestep. A plain prompt [B, L, C] is left as it is.
    SDXL's pooled embeddings, added_cond_kwargs["text_embeds"] [B, S·P], give that stage's [B, P].
    It holds no state between calls, so that threads and pipelines may share the model.
    """

    def __init__(
        self,
        width: int,
        num_train_timesteps: int,
        pooled_input: _PooledInput | None = None,
        before: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.width = width
        self.num_train_timesteps = num_train_timesteps
        self.pooled_input = pooled_input
        self.before = before

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # torch leaves the keywords out while another thread registers or removes the hook.
        if kwargs is None:
            return None
        positional = len(args) > 2
        prompt = args[2] if positional else kwargs.get("encoder_hidden_states")
        if not isinstance(prompt, Tensor):
            return None
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        selected = self.select(prompt, timestep)
        packed = selected is not prompt
        if packed and self.before is not None and not torch.compiler.is_compiling():
            self.before(module)
        if self.pooled_input is not None:
            args = (*args[:3], *(self._with_stage(value, timestep) for value in args[3:]))
            kwargs = {name: self._with_stage(value, timestep) for name, value in kwargs.items()}
        if positional:
            return (*args[:2], selected, *args[3:]), kwargs
        return args, {**kwargs, "encoder_hidden_states": selected}

    def _with_stage(self, value: Any, timestep: Tensor | float) -> Any:
        """added_cond_kwargs with the pooled embedding of one stage; anything else as it is."""
        if not isinstance(value, dict) or "text_embeds" not in value or "time_ids" not in value:
            return value
        assert self.pooled_input is not None
        pooled, time_ids = value["text_embeds"], value["time_ids"]
        width = self.pooled_input.width - time_ids.shape[-1] * self.pooled_input.time_width
        if pooled.shape[-1] == width:
            return value
        if pooled.shape[-1] % width:
            raise ValueError(
                f"pooled_prompt_embeds of {pooled.shape[-1]} numbers are neither one embedding of "
                f"this model ({width}) nor one a stage (a multiple of that); make them with "
                "sefi_fast.prompts.encode_with_pooled for this pipeline"
            )
        stages = pooled.unflatten(-1, (-1, width))
        stage = stage_of(timestep, stages.shape[1], self.num_train_timesteps).reshape(-1)
        stage = stage.to(pooled.device)
        if stage.shape[0] == 1:
            chosen = stages.index_select(1, stage).squeeze(1)
        else:
            chosen = stages[torch.arange(pooled.shape[0], device=pooled.device), stage]
        return {**value, "text_embeds": chosen}

    def select(self, prompt: Tensor, timestep: Tensor | float) -> Tensor:
        """The streams [B, M, 2·C] of this timestep; a plain prompt as it is."""
        if prompt.dim() == 3 and prompt.shape[-1] == self.width:
            return prompt
        return select_stage(prompt, self.width, timestep, self.num_train_timesteps)


def install_stage_hook(
    model: nn.Module,
    width: int,
    num_train_timesteps: int = 1000,
    before: Callable[[nn.Module], None] | None = None,
) -> RemovableHandle:
    """Installs the stage hook, before all other hooks, on a U-Net or ControlNet.

    Args:
        model: called as (sample, timestep, encoder_hidden_states), in order or by name.
        width: C, columns of a plain prompt.
        num_train_timesteps: T of the scheduler.
        before: called with the model ahead of each of its calls with a packed prompt, but for
            compiled ones.

    Returns:
        The handle; its ``remove()`` takes the hook off.

    Raises:
        ValueError: here, if the model has a stage hook already; in the model's forward, if the
            width of a prompt is neither packed nor plain.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if any(isinstance(hook, StageHook) for hook in model._forward_pre_hooks.values()):
        raise ValueError(
            f"{type(model).__name__} has a stage hook already, and a second one would take the "
            "selected stage for a plain prompt; remove the first"
        )
    hook = StageHook(width, num_train_timesteps, _pooled_input(model), before)
    return model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def _pooled_input(model: nn.Module) -> _PooledInput | None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "addition_embed_type", None) != "text_time":
        return None
    return _PooledInput(
        config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    )
