"""The forward-pre-hook that gives a U-Net or ControlNet the stage its timestep asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sefi_fast.conditioning.packing import packed_stages, stage_index, take_stage
from sefi_fast.conditioning.stages import stage_of


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
        tokens_per_stream: int,
        num_train_timesteps: int,
        pooled_input: _PooledInput | None = None,
        before: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.tokens_per_stream = tokens_per_stream
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
                "sefi_fast.conditioning.encode_with_pooled for this pipeline"
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
        tokens = self.tokens_per_stream
        length = prompt.shape[1]
        if packed_stages(length, tokens) is None:
            if length > tokens and length % tokens == 1:
                raise ValueError(
                    f"prompt_embeds of {length} rows are neither a packed prompt (stages·2·{tokens}"
                    f" + 1 rows) nor a plain one, of which none has one row more than a multiple "
                    f"of {tokens}: make them with sefi_fast.encode for this pipeline"
                )
            return prompt
        stage = stage_index(prompt, tokens, timestep, self.num_train_timesteps)
        return torch.cat(take_stage(prompt, tokens, stage).chunk(2, dim=1), dim=-1)


def install_stage_hook(
    model: nn.Module,
    tokens_per_stream: int,
    num_train_timesteps: int = 1000,
    before: Callable[[nn.Module], None] | None = None,
) -> RemovableHandle:
    """Installs the stage hook, before all other hooks, on a U-Net or ControlNet.

    Args:
        model: called as (sample, timestep, encoder_hidden_states), in order or by name.
        tokens_per_stream: M, tokens of one prompt.
        num_train_timesteps: T of the scheduler.
        before: called with the model ahead of each of its calls with a packed prompt, but for
            compiled ones.

    Returns:
        The handle; its ``remove()`` takes the hook off.

    Raises:
        ValueError: here, if the model has a stage hook already; in the model's forward, if the
            length of a prompt is neither packed nor plain.
    """
    if tokens_per_stream < 1:
        raise ValueError(f"tokens_per_stream must be at least 1, got {tokens_per_stream}")
    if any(isinstance(hook, StageHook) for hook in model._forward_pre_hooks.values()):
        raise ValueError(
            f"{type(model).__name__} has a stage hook already, and a second one would take the "
            "selected stage for a plain prompt; remove the first"
        )
    hook = StageHook(tokens_per_stream, num_train_timesteps, _pooled_input(model), before)
    return model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def _pooled_input(model: nn.Module) -> _PooledInput | None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "addition_embed_type", None) != "text_time":
        return None
    return _PooledInput(
        config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    )
