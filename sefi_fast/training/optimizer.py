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
    """What the learning rate is multiplied by in the step after `done` others.

    Over `warmup_steps` it rises evenly to 1; then it stays (constant), or falls along half a cosine
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
    """Exponential moving average of a lane's tokens, float32, on their device.

    The decay of update t, counted from 0, is min(decay, (1 + t) / (10 + t)), so that the start
    values do not linger in short runs.

    Args:
        decay: what is kept of the average in one step, below 1.
        start: the tokens before the first step.
    """

    def __init__(self, decay: float, start: Tensor) -> None:
        self._decay = decay
        self._updates = 0
        self._average = start.detach().clone()

    def update(self, rows: Tensor) -> None:
        """Takes in the rows after a step; rows that hold NaN or infinity are left out."""
        kept = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        moved = self._average.lerp(rows.detach(), 1 - kept)
        # Chosen on the device: asking whether it is finite would wait for it.
        self._average = torch.where(torch.isfinite(moved).all(), moved, self._average)

    def current(self) -> Tensor:
        """The average, on the CPU."""
        return self._average.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """The average, and how many updates made it."""
        return {"updates": torch.tensor(self._updates), "average": self._average.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from what `state_dict` gave."""
        self._updates = int(state["updates"])
        self._average = state["average"].to(self._average.device, copy=True)


_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_FIRST_SCALE = 2.0**12
_GROWTH_INTERVAL = 2000
# A loss that still overflows when it is not scaled up at all is no matter of the scale.
_LOWEST_SCALE = 1.0


class _Parameter(NamedTuple):
    """encoder: whose tokens it makes. name: in its module. shape: there."""

    encoder: int
    name: str
    shape: torch.Size

    @property
    def label(self) -> str:
        return _label(self.encoder, self.name)


class LaneState:
    """Parameters of L lanes, Adam's moments, loss scales and the last good tokens.

    Every lane is a row: a row never depends on another one, and one call of a few elementwise
    operations updates all of them, without waiting for the device. The update is AdamW's without
    weight decay, that of `torch.optim.AdamW` up to rounding.

    Attributes:
        parameters: float32 [L, P], the leaf that gradients are taken in.
        rate: float64 [L], factor of the learning rate in the next update.
        scale: float32 [L], what a lane's loss is multiplied by before its gradient is taken.
        last_good: float32 [L, S, 2 or 1, W, C], the newest tokens that gave a finite loss; those of
            all text encoders side by side, C being the sum of their widths.

    Args:
        modules: of each lane one for each text encoder, alike in all lanes; copied.
        learning_rate: for the embedding rows.
        device: where to compute.
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
        own = [[dict(module.named_parameters()) for module in lane] for lane in modules]
        rows = [
            torch.cat([mine[p.encoder][p.name].detach().flatten() for p in self._layout])
            for mine in own
        ]
        rates = [
            [group["lr"] for module in lane for group in module.parameter_groups(learning_rate)]
            for lane in modules
        ]
        self._fixed = [
            {
                name: torch.stack([lane[number].get_buffer(name) for lane in modules]).to(device)
                for name, _ in module.named_buffers()
            }
            for number, module in enumerate(first)
        ]
        count = len(modules)
        self.parameters = torch.stack(rows).to(device, torch.float32).requires_grad_(True)
        self._group_rates = torch.tensor(rates, dtype=torch.float64, device=device)
        self.exp_avg = torch.zeros_like(self.parameters, requires_grad=False)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.updates = torch.zeros(count, dtype=torch.float64, device=device)
        self.rate = torch.ones(count, dtype=torch.float64, device=device)
        self.scale = torch.full(
            (count,), _FIRST_SCALE if scaling else 1.0, dtype=torch.float32, device=device
        )
        self.growth = torch.zeros(count, dtype=torch.float32, device=device)
        self.last_good = self.rows().detach().clone()

    def __len__(self) -> int:
        return self.parameters.shape[0]

    def rows(self) -> Tensor:
        """The tokens of all lanes, float32 [L, S, 2 or 1, W, C], differentiable in `parameters`."""
        # One split, whose backward is one concatenation; slices would add up a matrix each.
        parts = self.parameters.split([parameter.shape.numel() for parameter in self._layout], 1)
        own: list[dict[str, Tensor]] = [{} for _ in self._kinds]
        for parameter, part in zip(self._layout, parts, strict=True):
            own[parameter.encoder][parameter.name] = part.unflatten(1, parameter.shape)
        made = [
            mine["rows"] if module == "free" else mixed_rows(mine | fixed, heads)
            for mine, fixed, (module, heads) in zip(own, self._fixed, self._kinds, strict=True)
        ]
        rows = made[0] if len(made) == 1 else torch.cat(made, -1)
        return rows.unflatten(1, self._tokens_shape)

    @torch.no_grad()
    def update(self, gradient: Tensor, evaluated: Tensor, loss_is_finite: Tensor) -> Tensor:
        """One step of every lane whose loss and gradient are finite; the others keep their state.

        Args:
            gradient: [L, P], of the scaled losses.
            evaluated: [L, S, 2 or 1, W, C], the tokens the losses were computed with.
            loss_is_finite: bool [L].

        Returns:
            Bool [L], False where nothing was to be had from this step. An overflow that a smaller
            loss scale cures counts as True, though only the scale changes.
        """
        self.last_good.copy_(
            torch.where(_like(loss_is_finite, evaluated), evaluated, self.last_good)
        )
        if self.scaling:
            gradient = gradient / self.scale[:, None]
        largest = torch.linalg.vector_norm(gradient, float("inf"), dim=1)
        gradient_is_finite = torch.isfinite(largest)
        good = loss_is_finite & gradient_is_finite
        self._adam(torch.where(good[:, None], gradient, 0.0), good)
        if not self.scaling:
            return good
        curable = loss_is_finite & (self.scale > _LOWEST_SCALE)
        self._rescale(good, loss_is_finite)
        return good | curable

    def _adam(self, gradient: Tensor, good: Tensor) -> None:
        # A weight of 0 leaves a lane's moments and parameters exactly as they are.
        weight = good.to(gradient.dtype)[:, None]
        self.updates += good
        self.exp_avg.lerp_(gradient, weight * (1 - _BETAS[0]))
        self.exp_avg_sq.lerp_(gradient.square_(), weight * (1 - _BETAS[1]))
        count = self.updates.clamp(min=1)
        first_correction = 1 - _BETAS[0] ** count
        second_correction = (1 - _BETAS[1] ** count).sqrt().float()[:, None]
        steps = self._group_rates * (self.rate * good / first_correction)[:, None]
        parts = zip(
            self.parameters.detach().split(self._group_sizes, 1),
            self.exp_avg.split(self._group_sizes, 1),
            self.exp_avg_sq.split(self._group_sizes, 1),
            steps.float().split(1, 1),
            strict=True,
        )
        for parameters, exp_avg, exp_avg_sq, step in parts:
            spread = exp_avg_sq.sqrt().div_(second_correction).add_(_EPSILON)
            parameters.sub_((exp_avg / spread).mul_(step))

    def _rescale(self, good: Tensor, loss_is_finite: Tensor) -> None:
        """Halves the scale after an overflow, doubles it after many steps without one."""
        overflow = loss_is_finite & ~good
        self.growth.copy_(torch.where(overflow, 0.0, self.growth + good))
        grown = self.growth >= _GROWTH_INTERVAL
        self.growth.masked_fill_(grown, 0.0)
        self.scale.mul_(torch.where(overflow, 0.5, torch.where(grown, 2.0, 1.0)))
        self.scale.clamp_(min=_LOWEST_SCALE)

    def tensors(self) -> dict[str, Tensor]:
        """Everything an update changes, by name, each with one entry a lane: no copies."""
        return {
            "parameters": self.parameters.detach(),
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "updates": self.updates,
            "scale": self.scale,
            "growth": self.growth,
            "last_good": self.last_good,
        }

    def fixed_tensors(self) -> dict[str, Tensor]:
        """What belongs to the lanes and no update changes: no copies."""
        fixed = {
            f"fixed.{_label(number, name)}": tensor
            for number, mine in enumerate(self._fixed)
            for name, tensor in mine.items()
        }
        return {**fixed, "group_rates": self._group_rates, "rate": self.rate}

    def keep(self, index: Tensor) -> None:
        """Keeps the lanes of `index` only, in its order."""
        self.parameters = self.parameters.detach()[index].requires_grad_(True)
        for name in ("exp_avg", "exp_avg_sq", "updates", "scale", "growth", "last_good", "rate"):
            setattr(self, name, getattr(self, name)[index])
        self._group_rates = self._group_rates[index]
        self._fixed = [{n: tensor[index] for n, tensor in mine.items()} for mine in self._fixed]

    def state_dict(self, row: int) -> dict[str, Tensor]:
        """One lane's state on the CPU; the parameters and their moments by their names."""
        state = {}
        for kind, tensor in self.tensors().items():
            mine = tensor[row].detach().to("cpu", copy=True)
            if kind in ("parameters", "exp_avg", "exp_avg_sq"):
                parts = mine.split([parameter.shape.numel() for parameter in self._layout])
                for parameter, part in zip(self._layout, parts, strict=True):
                    state[f"{kind}.{parameter.label}"] = part.reshape(parameter.shape).clone()
            else:
                state[kind] = mine
        return state

    def load_state_dict(self, row: int, state: Mapping[str, Tensor]) -> None:
        """Puts one lane back to a state that `state_dict` gave for such a lane."""
        for kind, tensor in self.tensors().items():
            if kind in ("parameters", "exp_avg", "exp_avg_sq"):
                mine = torch.cat([state[f"{kind}.{p.label}"].flatten() for p in self._layout])
            else:
                mine = state[kind]
            tensor[row].copy_(mine)


def _groups(encoder: int, module: SubjectTokens) -> list[list[_Parameter]]:
    """The parameters of a module in the order of its groups."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [_Parameter(encoder, names[id(p)], p.shape) for p in group["params"]]
        for group in module.parameter_groups(1.0)
    ]


def _label(encoder: int, name: str) -> str:
    return name if encoder == 0 else f"encoder_{encoder + 1}.{name}"


def _like(flags: Tensor, tensor: Tensor) -> Tensor:
    return flags.view(-1, *(1,) * (tensor.ndim - 1))
