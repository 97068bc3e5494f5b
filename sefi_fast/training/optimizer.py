"""AdamW and its learning-rate schedule for a batch of subjects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sefi_fast.subject import SubjectTokens
from sefi_fast.subject.tokens import mixed_rows

if TYPE_CHECKING:
    from sefi_fast.training.config import TrainConfig


def rate_factor(config: TrainConfig, done: int) -> float:
    """Return the factor of the learning rate in the step that follows `done` others.

    It rises evenly to 1 over `warmup_steps`. Then it stays (constant), or falls along half a cosine
    or a straight line, to 0 just after the last step.
    """
    warmup = config.warmup_steps
    if done < warmup:
        return (done + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (done - warmup) / max(1, config.steps - warmup))
    if config.schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1 + math.cos(math.pi * progress))


class MovingAverage:
    """Exponential moving average of a subject's tokens, float32, on their device.

    The decay of update t, counted from 0, is min(decay, (1 + t) / (10 + t)), so that the start
    values do not linger in short runs. diffusers' `EMAModel` begins with a decay of 0 and takes
    NaN into the average.
    """

    def __init__(self, decay: float, start: Tensor) -> None:
        self._decay = decay
        self._updates = 0
        self._average = start.detach().clone()

    def update(self, rows: Tensor) -> None:
        """Average in the rows after a step, unless they hold NaN or infinity."""
        kept = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        moved = self._average.lerp(rows.detach(), 1 - kept)
        # Chosen on the device: asking whether it is finite would wait for it.
        self._average = torch.where(torch.isfinite(moved).all(), moved, self._average)

    def current(self) -> Tensor:
        """Return the average on the CPU."""
        return self._average.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average and the number of its updates."""
        return {"updates": torch.tensor(self._updates), "average": self._average.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state of `state_dict`."""
        self._updates = int(state["updates"])
        self._average = state["average"].to(self._average.device, copy=True)


_MOMENTS = ("exp_avg", "exp_avg_sq")
_OTHERS = ("updates", "scale", "growth", "last_good")
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_FIRST_SCALE = 2.0**12
_GROWTH_INTERVAL = 2000
# A smaller scale does not help a loss that overflows without scaling.
_LOWEST_SCALE = 1.0


class _Parameter(NamedTuple):
    """A parameter of the module that makes the tokens of text encoder `encoder`."""

    encoder: int
    name: str
    shape: torch.Size

    @property
    def label(self) -> str:
        return _label(self.encoder, self.name)


class BatchedAdamW:
    """Parameters of L subjects, Adam's moments, loss scales and the last good tokens.

    Each subject is a row, and rows never depend on each other. One call of a few elementwise
    operations updates all of them without waiting for the device. The update is that of
    `torch.optim.AdamW` without weight decay, up to rounding.

    Attributes:
        parameters: float32 [L, P], the leaf of the gradients.
        rate: float64 [L], factor of the learning rate in the next update.
        scale: float32 [L], factor of each subject's loss before its gradient is taken.
        last_good: float32 [L, S, 2 or 1, W, C], the newest tokens that gave a finite loss; C is the
            sum of the widths of all text encoders.

    Args:
        modules: one for each text encoder of each subject, alike in all subjects; copied.
        learning_rate: for the embedding rows.
        scaling: whether losses are scaled, for float16.
    """

    def __init__(
        self,
        modules: Sequence[Sequence[SubjectTokens]],
        learning_rate: float,
        device: torch.device,
        scaling: bool,
    ) -> None:
        first = modules[0]
        members = [part for number, module in enumerate(first) for part in _groups(number, module)]
        self._layout = [parameter for part in members for parameter in part]
        self._group_sizes = [sum(p.shape.numel() for p in part) for part in members]
        self._kinds = [(module.module, module.heads) for module in first]
        self._tokens_shape = (first[0].stages, first[0].streams, first[0].vectors)
        self.scaling = scaling
        own = [[dict(module.named_parameters()) for module in subject] for subject in modules]
        rows = [
            torch.cat([mine[p.encoder][p.name].detach().flatten() for p in self._layout])
            for mine in own
        ]
        rates = [
            [group["lr"] for module in subject for group in module.parameter_groups(learning_rate)]
            for subject in modules
        ]
        buffers = [[dict(module.named_buffers()) for module in subject] for subject in modules]
        self._fixed = [
            {name: torch.stack([one[name] for one in column]).to(device) for name in column[0]}
            for column in zip(*buffers, strict=True)
        ]
        count = len(modules)
        self.parameters = torch.stack(rows).to(device, torch.float32).requires_grad_(True)
        self._group_rates = torch.tensor(rates, dtype=torch.float64, device=device)
        self.exp_avg = torch.zeros_like(self.parameters, requires_grad=False)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.updates = torch.zeros(count, dtype=torch.float64, device=device)
        self.rate = torch.ones(count, dtype=torch.float64, device=device)
        self.growth = torch.zeros(count, dtype=torch.float32, device=device)
        self.scale = torch.full_like(self.growth, _FIRST_SCALE if scaling else 1.0)
        self.last_good = self.rows().detach().clone()

    def __len__(self) -> int:
        return self.parameters.shape[0]

    def rows(self) -> Tensor:
        """Return all tokens, float32 [L, S, 2 or 1, W, C], differentiable in `parameters`."""
        # One split, whose backward is one concatenation; slices would add up a matrix each.
        parts = torch.split(self.parameters, [p.shape.numel() for p in self._layout], 1)
        own: list[dict[str, Tensor]] = [{} for _ in self._kinds]
        for parameter, part in zip(self._layout, parts, strict=True):
            own[parameter.encoder][parameter.name] = part.view(-1, *parameter.shape)
        made = [
            mine["rows"] if module == "free" else mixed_rows(mine | fixed, heads)
            for mine, fixed, (module, heads) in zip(own, self._fixed, self._kinds, strict=True)
        ]
        rows = made[0] if len(made) == 1 else torch.cat(made, -1)
        return rows.view(len(rows), *self._tokens_shape, -1)

    @torch.no_grad()
    def update(self, gradient: Tensor, evaluated: Tensor, loss_is_finite: Tensor) -> Tensor:
        """Update each subject whose loss and gradient are finite; the others keep their state.

        Args:
            gradient: [L, P], of the scaled losses.
            evaluated: [L, S, 2 or 1, W, C], the tokens of these losses.
            loss_is_finite: bool [L].

        Returns:
            Bool [L], False where the step was lost. An overflow that a smaller loss scale cures
            counts as True, though only the scale changes.
        """
        kept = loss_is_finite.view(-1, *(1,) * (evaluated.ndim - 1))
        self.last_good.copy_(torch.where(kept, evaluated, self.last_good))
        if self.scaling:
            gradient = gradient / self.scale[:, None]
        largest = torch.linalg.vector_norm(gradient, float("inf"), dim=1)
        good = loss_is_finite & torch.isfinite(largest)
        self._adam(torch.where(good[:, None], gradient, 0.0), good)
        if not self.scaling:
            return good
        curable = loss_is_finite & (self.scale > _LOWEST_SCALE)
        self._rescale(good, loss_is_finite)
        return good | curable

    def _adam(self, gradient: Tensor, good: Tensor) -> None:
        # A weight of 0 leaves a subject's moments and parameters exactly as they are.
        weight = good.to(gradient.dtype)[:, None]
        self.updates += good
        self.exp_avg.lerp_(gradient, weight * (1 - _BETAS[0]))
        self.exp_avg_sq.lerp_(gradient.square_(), weight * (1 - _BETAS[1]))
        count = self.updates.clamp(min=1)
        first_correction = 1 - _BETAS[0] ** count
        second_correction = (1 - _BETAS[1] ** count).sqrt().float()[:, None]
        steps = self._group_rates * (self.rate * good / first_correction)[:, None]
        parts = zip(
            torch.split(self.parameters.detach(), self._group_sizes, 1),
            torch.split(self.exp_avg, self._group_sizes, 1),
            torch.split(self.exp_avg_sq, self._group_sizes, 1),
            torch.split(steps.float(), 1, 1),
            strict=True,
        )
        for parameters, exp_avg, exp_avg_sq, step in parts:
            spread = exp_avg_sq.sqrt().div_(second_correction).add_(_EPSILON)
            parameters.sub_((exp_avg / spread).mul_(step))

    def _rescale(self, good: Tensor, loss_is_finite: Tensor) -> None:
        """Halve the scale after an overflow, double it after many steps without one."""
        overflow = loss_is_finite & ~good
        self.growth.copy_(torch.where(overflow, 0.0, self.growth + good))
        grown = self.growth >= _GROWTH_INTERVAL
        self.growth.masked_fill_(grown, 0.0)
        self.scale.mul_(torch.where(overflow, 0.5, torch.where(grown, 2.0, 1.0)))
        self.scale.clamp_(min=_LOWEST_SCALE)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that an update changes, by name, with an entry for each subject: no copies."""
        others = {name: getattr(self, name) for name in _MOMENTS + _OTHERS}
        return {"parameters": self.parameters.detach(), **others}

    def fixed_tensors(self) -> dict[str, Tensor]:
        """Return the subjects' tensors that no update changes, by name: no copies."""
        fixed = {
            f"fixed.{_label(number, name)}": tensor
            for number, mine in enumerate(self._fixed)
            for name, tensor in mine.items()
        }
        return {**fixed, "group_rates": self._group_rates, "rate": self.rate}

    def keep(self, index: Tensor) -> None:
        """Keep the subjects of `index` only, in its order."""
        self.parameters = self.parameters.detach()[index].requires_grad_(True)
        for name in (*_MOMENTS, *_OTHERS, "rate"):
            setattr(self, name, getattr(self, name)[index])
        self._group_rates = self._group_rates[index]
        self._fixed = [{n: tensor[index] for n, tensor in mine.items()} for mine in self._fixed]

    def state_dict(self, row: int) -> dict[str, Tensor]:
        """Return one subject's state on the CPU; parameters and their moments by their names."""
        state = {}
        for kind, tensor in self.tensors().items():
            mine = tensor[row].detach().to("cpu", copy=True)
            if kind == "parameters" or kind in _MOMENTS:
                parts = torch.split(mine, [p.shape.numel() for p in self._layout])
                for parameter, part in zip(self._layout, parts, strict=True):
                    state[f"{kind}.{parameter.label}"] = part.reshape(parameter.shape).clone()
            else:
                state[kind] = mine
        return state

    def load_state_dict(self, row: int, state: Mapping[str, Tensor]) -> None:
        """Restore one subject's state of `state_dict`."""
        for kind, tensor in self.tensors().items():
            if kind == "parameters" or kind in _MOMENTS:
                mine = torch.cat([state[f"{kind}.{p.label}"].flatten() for p in self._layout])
            else:
                mine = state[kind]
            tensor[row].copy_(mine)


def _groups(encoder: int, module: SubjectTokens) -> list[list[_Parameter]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [_Parameter(encoder, names[id(p)], p.shape) for p in group["params"]]
        for group in module.parameter_groups(1.0)
    ]


def _label(encoder: int, name: str) -> str:
    return name if encoder == 0 else f"encoder_{encoder + 1}.{name}"
