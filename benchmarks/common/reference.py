"""Inputs of a benchmark, and their float64 results by the equations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from common.shapes import Problem

RESULTS = ("output", "subject_loss", "grad_query", "grad_key", "grad_value")


class Inputs(NamedTuple):
    """One call's tensors; the query and grad_output are views of [B, N, H*D], as diffusers' are."""

    query: Tensor
    key: Tensor
    value: Tensor
    reference_key: Tensor
    grad_output: Tensor
    grad_subject_loss: Tensor
    scale: float


class Results(NamedTuple):
    """Results of forward and backward; `subject_loss` is None for a provider without the loss."""

    output: Tensor
    subject_loss: Tensor | None
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


def make_inputs(
    problem: Problem, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """Fresh random tensors; the reference key is near the key, as it is early in training.

    The reference key has batch 1: one reference sentence serves all samples.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def heads_of(batch: int, length: int, spread: float = 1.0) -> Tensor:
        flat = torch.randn(
            batch, length, problem.heads * problem.head_dim, generator=generator, device=device
        )
        rows = flat.mul_(spread).to(dtype).view(batch, length, problem.heads, problem.head_dim)
        return rows.transpose(1, 2)

    key = heads_of(problem.batch, problem.keys)
    drift = heads_of(1, problem.keys, 0.5)
    grad_subject_loss = torch.rand(problem.batch, generator=generator, device=device) + 0.5
    return Inputs(
        query=heads_of(problem.batch, problem.queries).requires_grad_(),
        key=key.clone().requires_grad_(),
        value=heads_of(problem.batch, problem.keys).requires_grad_(),
        reference_key=(key[:1] + drift).to(dtype),
        grad_output=heads_of(problem.batch, problem.queries),
        grad_subject_loss=grad_subject_loss,
        scale=problem.head_dim**-0.5,
    )


def float64_results(inputs: Inputs, with_loss: bool = True) -> Results:
    """Equations 4, 5 and 7 to 9 of docs/method.md in float64, one sample and head at a time.

    Written out by hand and without autograd, so that it shares nothing with any provider.
    """
    query, key, value = (tensor.detach() for tensor in inputs[:3])
    batch, heads, queries, head_dim = query.shape

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=torch.float64, device=tensor.device)

    output, grad_query = like(query), like(query)
    grad_key, grad_value = like(key), like(value)
    subject_loss = torch.zeros(batch, dtype=torch.float64, device=query.device)
    for b in range(batch):
        d_probs_loss = 2.0 * inputs.grad_subject_loss[b].double() / heads
        for h in range(heads):
            q, k, v = (tensor[b, h].double() for tensor in (query, key, value))
            grad_out = inputs.grad_output[b, h].double()
            attention = torch.softmax(q @ k.T * inputs.scale, dim=-1)
            output[b, h] = attention @ v
            grad_attention = grad_out @ v.T
            if with_loss:
                reference = inputs.reference_key[0, h].double()
                difference = attention - torch.softmax(q @ reference.T * inputs.scale, dim=-1)
                subject_loss[b] += difference.square().sum() / heads
                grad_attention += d_probs_loss * difference
            weighted = attention * grad_attention
            grad_scores = weighted - attention * weighted.sum(-1, keepdim=True)
            grad_query[b, h] = grad_scores @ k * inputs.scale
            grad_key[b, h] = grad_scores.T @ q * inputs.scale
            grad_value[b, h] = attention.T @ grad_out
    return Results(output, subject_loss if with_loss else None, grad_query, grad_key, grad_value)


def errors(results: Results, wanted: Results) -> dict[str, float]:
    """Return the largest absolute error of each result over its largest true magnitude.

    Where the truth is zero throughout (one key has no gradient), it is the absolute error.
    """
    found: dict[str, float] = {}
    for name in RESULTS:
        got, true = getattr(results, name), getattr(wanted, name)
        if got is None or true is None:
            continue
        if got.shape != true.shape:
            found[name] = float("inf")
            continue
        error = (got.detach().double() - true).abs().max().item()
        size = true.abs().max().item() or 1.0
        found[name] = error / size if error == error else float("inf")
    return found


# Peers round in other ways (through logarithms, tf32): larger errors are not rounding.
PEER_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def problem_with(
    found: dict[str, float], eager: dict[str, float], dtype: torch.dtype, strict: bool
) -> str | None:
    """Return None for right results, else the first wrong one in words.

    strict (sefi_fast's backends): at most twice the eager path's error in the same dtype plus a
    floor of a few units in the last place. Others: within PEER_TOLERANCE.
    """
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    for name, error in found.items():
        # A subject loss is one float32 sum. Its roundings nearly cancel in the eager path at times.
        floor = eps + 4.0 * eps32 if name == "subject_loss" else 4.0 * eps
        limit = 2.0 * eager[name] + floor if strict else PEER_TOLERANCE[dtype]
        if not error <= limit:
            return f"{name} is off by {error:.2g} of its scale, allowed are {limit:.2g}"
    return None
