"""Packed prompts: one K and one V stream for each stage of the denoising."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sefi_fast.errors import PromptError


def stage_of(timestep: Tensor | float, stages: int, num_train_timesteps: int = 1000) -> Tensor:
    """Return ``clamp(floor(t·S/T), 0, S−1)`` (docs/method.md §1) as int64, shaped as the timestep.

    Timesteps may be fractional (Karras-type schedulers). Nothing is read back from the device.

    Args:
        timestep: t, 0 = clean; a number, or a tensor of any shape, dtype and device.
        stages: S, at least 1.
        num_train_timesteps: T of the scheduler the model was trained with.
    """
    for name, least in (("stages", stages), ("num_train_timesteps", num_train_timesteps)):
        if least < 1:
            raise ValueError(f"{name} must be at least 1, got {least}")
    if not isinstance(timestep, Tensor):
        timestep = torch.tensor(timestep)
    if timestep.is_floating_point():
        # Half precision cannot represent t·S exactly.
        wide = timestep if timestep.dtype == torch.float64 else timestep.to(torch.float32)
        stage = torch.floor(wide * stages / num_train_timesteps).to(torch.int64)
    else:
        stage = (timestep.to(torch.int64) * stages).div(num_train_timesteps, rounding_mode="floor")
    return stage.clamp(0, stages - 1)


def pack(streams: Tensor) -> Tensor:
    """Pack streams [B, S, 2, M, C] into a prompt [B, M, S·(2·C + 1)]; differentiable."""
    if streams.dim() != 5 or streams.shape[2] != 2:
        raise ValueError(
            f"streams must be [B, stages, 2, tokens, C], got shape {tuple(streams.shape)}"
        )
    by_token = streams.permute(0, 3, 1, 2, 4).flatten(3)
    return torch.nn.functional.pad(by_token, (0, 1)).flatten(2)


def packed_stages(columns: int, width: int) -> int | None:
    """Return the number of stages of a packed prompt, or None for one that is not packed.

    Args:
        columns: size of the prompt's last dimension.
        width: C, columns of a plain prompt of this model.
    """
    # torch.compile refuses divmod for a size that varies.
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
    by_stage = torch.unflatten(packed, 2, (stages, 2 * width + 1))[..., :-1]
    return torch.unflatten(by_stage, 3, (2, width)).permute(0, 2, 3, 1, 4)


def select_stage(
    packed: Tensor, width: int, timestep: Tensor | float, num_train_timesteps: int = 1000
) -> Tensor:
    """Return the K and V stream of the timestep's stage, side by side: [B, M, 2·C].

    Args:
        packed: [B, M, S·(2·C + 1)].
        width: C.
        timestep: one number or tensor for all samples, or [B] for one a sample; any device.
        num_train_timesteps: T.

    Raises:
        ValueError: the prompt is not packed for this width, or there is neither one timestep nor
            one for each sample.
    """
    return _at(unpack(packed, width), timestep, num_train_timesteps).transpose(1, 2).flatten(2)


def _at(by_stage: Tensor, timestep: Tensor | float, num_train_timesteps: int) -> Tensor:
    """Return [B, …] of [B, S, …]: each sample at the stage of its timestep."""
    samples, stages = by_stage.shape[:2]
    stage = stage_of(timestep, stages, num_train_timesteps).reshape(-1)
    if stage.shape[0] not in (1, samples):
        raise ValueError(
            f"{stage.shape[0]} timesteps for a batch of {samples} prompts; "
            "give one, or one for each"
        )
    stage = stage.to(by_stage.device)
    if stage.shape[0] == 1:
        return by_stage.index_select(1, stage).squeeze(1)
    return by_stage[torch.arange(samples, device=by_stage.device), stage]


def match_stages(prompts: Sequence[Tensor], width: int, stages: int | None = None) -> list[Tensor]:
    """Pack prompts with one number of stages if any is packed; plain ones repeat in every stage.

    Args:
        prompts: [B, M, …] each, plain or packed.
        width: C, columns of a plain prompt.
        stages: pack plain prompts too, with a multiple of this number of stages.
    """
    found = [stages, *(packed_stages(prompt.shape[-1], width) for prompt in prompts)]
    common = math.lcm(*(count for count in found if count is not None))
    if not any(found):
        return list(prompts)
    matched = []
    for prompt in prompts:
        if prompt.shape[-1] == width:
            streams = prompt[:, None, None].expand(-1, common, 2, -1, -1)
        else:
            streams = unpack(prompt, width)
            streams = streams.repeat_interleave(common // streams.shape[1], dim=1)
        matched.append(pack(streams))
    tokens = [prompt.shape[1] for prompt in matched]
    if len(set(tokens)) > 1:
        raise PromptError(
            f"the prompt has {tokens[0]} tokens, the negative prompt {tokens[1]} tokens, and one "
            "of them holds a subject. Both need the same number of tokens. Give prompt_embeds of "
            "one length."
        )
    return matched


def match_pooled_stages(pooled: Sequence[Tensor], width: int) -> list[Tensor]:
    """Repeat pooled embeddings [B, S·P], so that all have one number of stages."""
    by_stage = [_pooled_by_stage(one, width) for one in pooled]
    common = math.lcm(*(one.shape[1] for one in by_stage))
    return [one.repeat_interleave(common // one.shape[1], 1).flatten(1) for one in by_stage]


def _pooled_by_stage(pooled: Tensor, width: int) -> Tensor:
    if pooled.shape[-1] % width:
        raise ValueError(
            f"pooled embeddings of {pooled.shape[-1]} numbers are neither one embedding of this "
            f"model ({width}) nor one a stage (a multiple of that). Make them with "
            "sefi_fast.prompts.encode_with_pooled for this pipeline."
        )
    return torch.unflatten(pooled, -1, (-1, width))


class StageHook:
    """Forward-pre-hook that replaces a packed prompt by the streams of one stage: [B, M, 2·C].

    The stage is that of the call's timestep. A plain prompt [B, L, C] is left as it is.
    SDXL's pooled embeddings, added_cond_kwargs["text_embeds"] [B, S·P], give that stage's [B, P].
    It holds no state between calls, so that threads and pipelines may share the model.
    """

    def __init__(
        self,
        model: nn.Module,
        width: int,
        num_train_timesteps: int,
        before: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.width = width
        self.num_train_timesteps = num_train_timesteps
        self.before = before
        config: Any = getattr(model, "config", None)
        self._added_widths: tuple[int, int] | None = None
        if getattr(config, "addition_embed_type", None) == "text_time":
            self._added_widths = (
                config.projection_class_embeddings_input_dim,
                config.addition_time_embed_dim,
            )

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
        if prompt.dim() != 3 or prompt.shape[-1] != self.width:
            prompt = select_stage(prompt, self.width, timestep, self.num_train_timesteps)
            if self.before is not None and not torch.compiler.is_compiling():
                self.before(module)
        if self._added_widths is not None:
            args = (*args[:3], *(self._with_stage(value, timestep) for value in args[3:]))
            kwargs = {name: self._with_stage(value, timestep) for name, value in kwargs.items()}
        if positional:
            return (*args[:2], prompt, *args[3:]), kwargs
        return args, {**kwargs, "encoder_hidden_states": prompt}

    def _with_stage(self, value: Any, timestep: Tensor | float) -> Any:
        """Return added_cond_kwargs with the pooled embedding of one stage, other values as is."""
        if not isinstance(value, dict) or "text_embeds" not in value or "time_ids" not in value:
            return value
        pooled, time_ids = value["text_embeds"], value["time_ids"]
        assert self._added_widths is not None
        width = self._added_widths[0] - time_ids.shape[-1] * self._added_widths[1]
        if pooled.shape[-1] == width:
            return value
        by_stage = _pooled_by_stage(pooled, width)
        return {**value, "text_embeds": _at(by_stage, timestep, self.num_train_timesteps)}


def has_stage_hook(model: nn.Module) -> bool:
    """Return whether a model takes packed prompts."""
    return any(isinstance(hook, StageHook) for hook in model._forward_pre_hooks.values())


def install_stage_hook(
    model: nn.Module,
    width: int,
    num_train_timesteps: int = 1000,
    before: Callable[[nn.Module], None] | None = None,
) -> RemovableHandle:
    """Install a `StageHook` on a U-Net or ControlNet, before all other hooks.

    Args:
        model: called as (sample, timestep, encoder_hidden_states), in order or by name.
        width: C, columns of a plain prompt.
        num_train_timesteps: T of the scheduler.
        before: called with the model before each call with a packed prompt, except compiled calls.

    Returns:
        The handle; its ``remove()`` takes the hook off.

    Raises:
        ValueError: here, if the model has a stage hook already; in the model's forward, if the
            width of a prompt is neither packed nor plain.
    """
    if has_stage_hook(model):
        raise ValueError(
            f"{type(model).__name__} has a stage hook already. A second one would take the "
            "selected stage for a plain prompt. Remove the first."
        )
    hook = StageHook(model, width, num_train_timesteps, before)
    return model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
