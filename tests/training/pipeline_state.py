"""Everything of a pipeline that training touches."""

from __future__ import annotations

from typing import Any

from torch import nn


def state_of(pipe: Any) -> dict[Any, Any]:
    """To be compared before and after."""
    state: dict[Any, Any] = {"pipe": {k: id(v) for k, v in vars(pipe).items()}}
    state["scheduler"] = {k: str(v) for k, v in vars(pipe.scheduler).items()}
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        for key, tensor in [*part.named_parameters(), *part.named_buffers()]:
            place = (id(tensor), tensor.dtype, tensor.device, tensor.stride(), tensor.requires_grad)
            state[name, key] = (*place, tensor.detach().double().sum().item())
        for key, module in part.named_modules():
            hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
            processor = id(getattr(module, "processor", None))
            checkpointing = getattr(module, "gradient_checkpointing", None)
            state[name, key, "module"] = (module.training, processor, checkpointing, hooks)
    return state
