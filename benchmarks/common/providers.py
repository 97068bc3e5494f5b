"""Every way to compute the call: sefi's backends, eager maps, SDPA, xformers and FlexAttention."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from _reference import Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Forward = Callable[[Inputs], tuple[Tensor, Tensor | None]]
Family = Literal["sefi", "eager", "compiled", "sdpa", "xformers", "flex"]
COMPILED: tuple[Family, ...] = ("compiled", "flex")
"""Families that torch.compile makes for each shape, which takes longer than timing them."""


@dataclass(frozen=True)
class Contender:
    """One implementation; `run` gives the output and, with_loss, each sample's subject loss."""

    name: str
    family: Family
    with_loss: bool
    run: Forward
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def eager_maps(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The loss written plainly: both maps materialised, autograd keeps what it needs."""
    query, key, value, reference_key = inputs[:4]
    attention = torch.softmax(query @ key.transpose(-1, -2) * inputs.scale, dim=-1)
    with torch.no_grad():
        reference = torch.softmax(query @ reference_key.transpose(-1, -2) * inputs.scale, dim=-1)
    difference = (attention - reference).square()
    subject_loss = difference.sum((-1, -2), dtype=torch.float32).mean(1)
    return attention @ value, subject_loss


def _sefi(backend: str) -> Forward:
    from sefi_fast import fused_cross_attention

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
    """Compiled FlexAttention that also hands back the log-sum-exp, in old and new PyTorch."""
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
    """FlexAttention with the loss by equation 12, from five log-sum-exps and no map."""
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


def _sdpa_contenders(device: torch.device) -> list[Contender]:
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device.type == "cuda":
        backends["efficient"] = SDPBackend.EFFICIENT_ATTENTION
        backends["cudnn"] = SDPBackend.CUDNN_ATTENTION

    def only(backend: SDPBackend) -> Callable[[], AbstractContextManager[object]]:
        return lambda: sdpa_kernel(backend)

    chosen = [Contender("sdpa", "sdpa", False, _sdpa)]
    return chosen + [
        Contender(f"sdpa-{name}", "sdpa", False, _sdpa, only(backend))
        for name, backend in backends.items()
    ]


def contenders(
    device: torch.device, only: list[str] | None = None
) -> tuple[list[Contender], dict[str, str]]:
    """Those that can be tried on `device`, and for each that cannot, why.

    only: words; a contender stays when one of them starts its name. The eager maps always stay,
    since their error is the measure of the others'. Raises ValueError for a word that fits none.
    """
    from sefi_fast import available_backends

    found: list[Contender] = [Contender("eager-maps", "eager", True, eager_maps)]
    absent: dict[str, str] = {}
    for backend, reason in available_backends().items():
        name = f"sefi-{backend}"
        if backend == "triton" and device.type != "cuda":
            reason = "timed on CUDA only; on a CPU Triton's interpreter runs the kernels"
        if backend == "cuda" and device.type != "cuda":
            reason = "takes CUDA tensors only"
        if backend == "cpu" and device.type != "cpu":
            reason = "takes CPU tensors only"
        if reason is None:
            found.append(Contender(name, "sefi", True, _sefi(backend)))
        else:
            absent[name] = reason
    compiled = torch.compile(eager_maps, fullgraph=True, dynamic=False)
    found.append(Contender("eager-compiled", "compiled", True, compiled))
    found += _sdpa_contenders(device)
    if importlib.util.find_spec("xformers") is None:
        absent["xformers"] = "xformers is not installed"
    elif device.type != "cuda":
        absent["xformers"] = "takes CUDA tensors only"
    else:
        found.append(Contender("xformers", "xformers", False, _xformers))
    found.append(Contender("flex", "flex", True, _flex()))
    if only:
        known = [contender.name for contender in found] + list(absent)
        for word in only:
            if not any(name.startswith(word) for name in known):
                raise ValueError(f"--only {word!r} fits none of: {', '.join(known)}")
        found = [
            contender
            for contender in found
            if contender.family == "eager" or contender.name.startswith(tuple(only))
        ]
        absent = {name: why for name, why in absent.items() if name.startswith(tuple(only))}
    return found, absent
