"""Implementations of the call: sefi_fast's backends, eager maps, SDPA, xformers, FlexAttention."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.reference import Inputs, Results
from sefi_fast import available_backends, fused_cross_attention

Forward = Callable[[Inputs], tuple[Tensor, Tensor | None]]
Family = Literal["sefi", "eager", "compiled", "sdpa", "xformers", "flex"]
COMPILED: tuple[Family, ...] = ("compiled", "flex")
"""Families that torch.compile makes for each shape. Compiling takes longer than timing."""


@dataclass(frozen=True)
class Provider:
    """One implementation; `run` returns the output and, with_loss, each sample's subject loss."""

    name: str
    family: Family
    with_loss: bool
    run: Forward
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def eager_maps(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Compute the loss plainly: both maps in memory, autograd saves what it needs."""
    query, key, value, reference_key = inputs[:4]
    attention = torch.softmax(query @ key.transpose(-1, -2) * inputs.scale, dim=-1)
    with torch.no_grad():
        reference = torch.softmax(query @ reference_key.transpose(-1, -2) * inputs.scale, dim=-1)
    difference = (attention - reference).square()
    subject_loss = difference.sum((-1, -2), dtype=torch.float32).mean(1)
    return attention @ value, subject_loss


EAGER = Provider("eager-maps", "eager", True, eager_maps)


def _sefi(backend: str) -> Forward:
    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        result = fused_cross_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            reference_key=inputs.reference_key,
            scale=inputs.scale,
            backend=backend,
        )
        return result.output, result.subject_loss

    return run


def _sdpa(inputs: Inputs) -> tuple[Tensor, None]:
    output = F.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, scale=inputs.scale
    )
    return output, None


def _xformers(inputs: Inputs) -> tuple[Tensor, None]:
    from xformers.ops import memory_efficient_attention

    rows = (tensor.transpose(1, 2) for tensor in inputs[:3])
    return memory_efficient_attention(*rows, scale=inputs.scale).transpose(1, 2), None


def _attend_with_logsumexp() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return compiled FlexAttention that also returns the log-sum-exp, in old and new PyTorch."""
    from torch.nn.attention import flex_attention as flex

    attend: Callable[..., Any] = torch.compile(flex.flex_attention, dynamic=False)
    if not hasattr(flex, "AuxRequest"):
        return functools.partial(attend, return_lse=True)
    request = flex.AuxRequest(lse=True)

    def run(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        output, aux = attend(query, key, value, scale=scale, return_aux=request)
        return output, aux.lse

    return run


def _flex() -> Forward:
    """Return FlexAttention with the loss by equation 12, from five log-sum-exps, without a map."""
    attend = _attend_with_logsumexp()

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        query, key, value, reference_key = inputs[:4]
        reference_key = reference_key.expand_as(key)
        # A log-sum-exp needs no values; 16 columns are the fewest that FlexAttention takes.
        columns = value.detach()[..., :16].contiguous()

        def logsumexp(rows: Tensor, keys: Tensor, factor: float = 1.0) -> Tensor:
            return attend(rows, keys, columns, scale=factor * inputs.scale)[1]

        output, target = attend(query, key, value, scale=inputs.scale)
        with torch.no_grad():
            reference = logsumexp(query, reference_key)
            reference_twice = logsumexp(query, reference_key, 2.0)
        target_twice = logsumexp(query, key, 2.0)
        # q·k_t + stop(q)·k_r as one product of twice the width: no gradient through the reference.
        joined = logsumexp(
            torch.cat([query, query.detach()], dim=-1), torch.cat([key, reference_key], dim=-1)
        )
        row = (
            torch.exp(target_twice - 2.0 * target)
            + torch.exp(reference_twice - 2.0 * reference)
            - 2.0 * torch.exp(joined - target - reference)
        )
        return output, row.sum(-1).mean(1)

    return run


def _sdpa_providers(device: torch.device) -> list[Provider]:
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device.type == "cuda":
        backends["efficient"] = SDPBackend.EFFICIENT_ATTENTION
        backends["cudnn"] = SDPBackend.CUDNN_ATTENTION
    return [Provider("sdpa", "sdpa", False, _sdpa)] + [
        Provider(f"sdpa-{name}", "sdpa", False, _sdpa, functools.partial(sdpa_kernel, backend))
        for name, backend in backends.items()
    ]


def providers(
    device: torch.device, only: list[str] | None = None
) -> tuple[list[Provider], dict[str, str]]:
    """Return those that `device` can try, and for each of the others the reason why not.

    only: words; a provider stays when one of them starts its name. The eager maps always stay,
    because their error is the measure of the others'.

    Raises:
        ValueError: a word starts no name.
    """
    found: list[Provider] = [EAGER]
    absent: dict[str, str] = {}
    for backend, reason in available_backends().items():
        if backend == "triton" and device.type != "cuda":
            reason = "timed on CUDA only; on a CPU Triton's interpreter runs the kernels"
        if backend == "cuda" and device.type != "cuda":
            reason = "takes CUDA tensors only"
        if backend == "cpu" and device.type != "cpu":
            reason = "takes CPU tensors only"
        if reason is None:
            found.append(Provider(f"sefi-{backend}", "sefi", True, _sefi(backend)))
        else:
            absent[f"sefi-{backend}"] = reason
    compiled = torch.compile(eager_maps, fullgraph=True, dynamic=False)
    found.append(Provider("eager-compiled", "compiled", True, compiled))
    found += _sdpa_providers(device)
    if importlib.util.find_spec("xformers") is None:
        absent["xformers"] = "xformers is not installed"
    elif device.type != "cuda":
        absent["xformers"] = "takes CUDA tensors only"
    else:
        found.append(Provider("xformers", "xformers", False, _xformers))
    found.append(Provider("flex", "flex", True, _flex()))
    if only:
        known = [provider.name for provider in found] + list(absent)
        for word in only:
            if not any(name.startswith(word) for name in known):
                raise ValueError(f"--only {word!r} fits none of: {', '.join(known)}")
        words = tuple(only)
        found = [one for one in found if one is EAGER or one.name.startswith(words)]
        absent = {name: why for name, why in absent.items() if name.startswith(words)}
    return found, absent


class Workload:
    """Forward, backward and both of a provider on one problem's inputs.

    Speed, memory and correctness are measured on these same calls.
    """

    def __init__(self, provider: Provider, inputs: Inputs) -> None:
        self.provider = provider
        self.inputs = inputs
        self._leaves = (inputs.query, inputs.key, inputs.value)
        self._kept: tuple[Tensor, ...] | None = None

    def forward(self) -> tuple[Tensor, ...]:
        """Return (output, subject loss) or (output,), recorded for a backward as in training."""
        output, subject_loss = self.provider.run(self.inputs)
        return (output,) if subject_loss is None else (output, subject_loss)

    def _gradients(self, outputs: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        upstream = (self.inputs.grad_output, self.inputs.grad_subject_loss)[: len(outputs)]
        return torch.autograd.grad(outputs, self._leaves, upstream, retain_graph=keep)

    def backward(self) -> tuple[Tensor, ...]:
        """Return gradients of query, key and value from one kept forward pass."""
        if self._kept is None:
            self._kept = self.forward()
        return self._gradients(self._kept, keep=True)

    def both(self) -> tuple[Tensor, ...]:
        """Return (output, [subject loss,] grad_query, grad_key, grad_value)."""
        outputs = self.forward()
        return outputs + self._gradients(outputs, keep=False)

    def results(self) -> Results:
        """Return the tensors of `both` by name."""
        *outputs, grad_query, grad_key, grad_value = self.both()
        subject_loss = outputs[1].detach() if len(outputs) == 2 else None
        return Results(outputs[0].detach(), subject_loss, grad_query, grad_key, grad_value)

    def release(self) -> None:
        """Drop the kept forward pass and the tensors that it saved."""
        self._kept = None

    def call(self, direction: str) -> Callable[[], Any]:
        """Return the call of a direction, inside the provider's context (an SDPA backend)."""
        method = {"forward": self.forward, "backward": self.backward, "both": self.both}[direction]

        def run() -> Any:
            with self.provider.context():
                return method()

        return run
