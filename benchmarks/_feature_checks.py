"""Checks of what the benchmark does not use: maps, masks, weights, the reference's gradient."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from _reference import make_inputs
from _shapes import Problem
from torch import Tensor


class Case(NamedTuple):
    """One combination of options on a layer of `queries` rows and `head_dim` columns."""

    name: str
    queries: int
    head_dim: int
    mask: bool = False
    weights: bool = False
    maps: Literal["mean", "all"] | None = None
    reference_grad: bool = False
    one_key: bool = False
    """Keys, values and reference of batch 1, whose gradients sum over the batch."""


CASES = (
    Case("head-averaged maps", 100, 40, maps="mean"),
    Case("maps of every head, weights", 65, 64, weights=True, maps="all"),
    Case("gradient through the reference", 130, 80, reference_grad=True, weights=True),
    Case("masked keys and a sample with none left", 70, 40, mask=True, maps="mean"),
    Case("one key for all samples", 96, 160, one_key=True, reference_grad=True, maps="mean"),
)
_BATCH, _HEADS, _KEYS = 3, 4, 77


def _options(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(_BATCH, _KEYS, generator=generator) > 0.3
    mask[1] = False
    weights = 2 * torch.rand(_BATCH, _KEYS, generator=generator)
    # The second column of each sample names no token and must come back as zeros.
    tokens = torch.tensor([[4, -1, 76], [0, -1, 4], [70, -1, 1]])
    return {
        "key_mask": mask.to(device) if case.mask else None,
        "token_weights": weights.to(device) if case.weights else None,
        "probs_positions": tokens.to(device) if case.maps else None,
    }


def _drawn_on_cpu(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(13))


def _results(
    case: Case, backend: str, device: torch.device, dtype: torch.dtype, compute: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients with inputs drawn in `dtype` and computed in `compute`."""
    from sefi_fast import fused_cross_attention

    problem = Problem("custom", case.queries, case.head_dim, _HEADS, _BATCH, _KEYS)
    inputs = make_inputs(problem, device, dtype, seed=11)
    keys = 1 if case.one_key else _BATCH
    drawn = [inputs.query, inputs.key[:keys], inputs.value[:keys], inputs.reference_key]
    leaves = [tensor.detach().to(compute).requires_grad_() for tensor in drawn]
    query, key, value, reference_key = leaves
    found = fused_cross_attention(
        query,
        key,
        value,
        reference_key=reference_key,
        scale=inputs.scale,
        probs_heads=case.maps or "mean",
        reference_grad=case.reference_grad,
        backend=backend,
        **_options(case, device),
    )
    outputs = {
        "output": found.output,
        "subject_loss": found.subject_loss,
        "attn_probs": found.attn_probs,
    }
    upstream = {
        "output": inputs.grad_output.to(compute),
        "subject_loss": inputs.grad_subject_loss.to(found.subject_loss.dtype),
        "attn_probs": _drawn_on_cpu(found.attn_probs.shape).to(found.attn_probs),
    }
    used = [name for name in outputs if case.maps or name != "attn_probs"]
    wanted = leaves if case.reference_grad else leaves[:3]
    gradients = torch.autograd.grad(
        [outputs[name] for name in used], wanted, [upstream[name] for name in used]
    )
    names = ("grad_query", "grad_key", "grad_value", "grad_reference_key")
    return {name: outputs[name].detach() for name in used} | dict(
        zip(names, gradients, strict=False)
    )


def _errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    errors = {}
    for name, wanted in true.items():
        size = wanted.abs().max().item() or 1.0
        error = (found[name].double() - wanted.double()).abs().max().item() / size
        errors[name] = error if error == error else float("inf")
    return errors


def wrong_feature(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when every case is within twice the eager backend's error, else the first that is not.

    The meaning is the eager backend in float64 on the same inputs; a few units in the last place
    are allowed besides.
    """
    floor = 4.0 * torch.finfo(dtype).eps
    for case in CASES:
        true = _results(case, "eager", device, dtype, torch.float64)
        measure = _errors(_results(case, "eager", device, dtype, dtype), true)
        found = _errors(_results(case, backend, device, dtype, dtype), true)
        for name, error in found.items():
            limit = 2.0 * measure[name] + floor
            if not error <= limit:
                return f"{case.name}: {name} is off by {error:.2g}, allowed are {limit:.2g}"
    return None
