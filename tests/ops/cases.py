"""Hypothesis strategies of the operator's calls: shapes, layouts, options, kinds of numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from ops.inputs import Inputs, make_inputs
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "offset", "padded", "one row", "one head", "one sample")
NUMBERS = ("usual", "extreme", "one-hot", "identical", "constant", "zero")

# Where tiles, vectors and buckets begin and end; other sizes come between them.
_EDGES = (1, 2, 8, 15, 16, 17, 32, 40, 64, 65, 77, 80, 81, 96, 128, 129, 160, 256)


def _sizes(largest: int) -> st.SearchStrategy[int]:
    return st.sampled_from([e for e in _EDGES if e <= largest]) | st.integers(1, largest)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call as `make_inputs` takes it, how each tensor lies in memory, and what it holds."""

    options: dict[str, Any]
    layouts: tuple[str, str, str, str, str]
    numbers: str

    def inputs(self, device: str | torch.device = "cpu") -> Inputs:
        """The call's tensors: the same ones at every call."""
        inputs = make_inputs(**self.options, strided=False, device=device)
        inputs = dataclasses.replace(inputs, **_numbers(inputs, self.numbers))
        names = ("query", "key", "value", "reference_key", "grad_output")
        laid = {
            name: lay_out(tensor, layout)
            for name, layout in zip(names, self.layouts, strict=True)
            if (tensor := getattr(inputs, name)) is not None
        }
        return dataclasses.replace(inputs, **laid)


@st.composite
def cases(draw: st.DrawFn, *, largest: int = 256, numbers: tuple[str, ...] = NUMBERS) -> Case:
    """Any call the operator takes, with at most `largest` queries, keys and columns of a head."""
    kind = draw(st.sampled_from(numbers))
    flags = ("weights", "mask", "probs_all_heads", "broadcast_kv", "broadcast_reference")
    options: dict[str, Any] = {name: draw(st.booleans()) for name in flags}
    options |= {
        "batch": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 3)),
        "queries": draw(_sizes(min(largest, 97))),
        "keys": draw(_sizes(largest)),
        "head_dim": draw(_sizes(largest)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "reference": kind == "identical" or draw(st.booleans()),
        "reference_grad": draw(st.booleans()),
        "tokens": draw(st.integers(0, 4)),
        "scale": draw(st.sampled_from([None, None, 0.0, 1.0, -0.25])),
        "seed": draw(st.integers(0, 2**31)),
    }
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 5))
    # With all keys alike and all values alike the gradients are nothing but rounding.
    assume(not (layouts[1] == layouts[2] == "one row"))
    return Case(options, layouts, kind)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """[B, H, L, D] with a dense last axis as a caller may hold it, NaN in every unused place.

    "one row", "one head" and "one sample" repeat the first along an axis of stride 0.
    """
    batch, heads, length, width = tensor.shape
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "offset":
        # Three elements before the first: no row starts at a multiple of 16 bytes.
        buffer = tensor.new_full((tensor.numel() + 3,), torch.nan)
        return buffer[3:].view(tensor.shape).copy_(tensor)
    if layout == "padded":
        buffer = tensor.new_full((batch, heads, length + 1, width + 8), torch.nan)
        return buffer[:, :, :length, :width].copy_(tensor)
    if layout == "one row":
        return tensor[:, :, :1].expand_as(tensor)
    if layout == "one head":
        return tensor[:, :1].expand_as(tensor)
    if layout == "one sample":
        return tensor[:1].expand_as(tensor)
    return tensor.contiguous()


def _numbers(inputs: Inputs, kind: str) -> dict[str, Tensor | None]:
    """What replaces the usual random numbers."""
    query, key, reference = inputs.query, inputs.key, inputs.reference_key
    if kind == "extreme" and inputs.scale != 0:
        # The largest score of the call is ±1e4, as far as the dtype's own range allows.
        scores = query[:, :, :, None] * key.expand(len(query), -1, -1, -1)[:, :, None].float()
        largest = (scores.sum(-1) * inputs.scale).abs().max()
        factor = (1e4 / largest.clamp_min(1e-3)).clamp(1, 1e4).sqrt()
        keys = {"key": key, "reference_key": reference}
        stretched = {name: (x * factor).to(x.dtype) for name, x in keys.items() if x is not None}
        return {"query": (query * factor).to(query.dtype), **stretched}
    if kind == "one-hot" and inputs.scale != 0:
        # One key that every query points at, in one stream; the other stream stays soft.
        pointed = key.clone()
        pointed[:, :, :1] = 60 * torch.ones_like(key[:, :, :1]) / key.shape[3]
        sign = 1.0 if inputs.scale > 0 else -1.0
        return {"query": sign * (query.abs() + 1), "key": pointed}
    if kind == "identical" and reference is not None:
        same = key if len(key) <= len(reference) else key[:1]
        both = same.expand(len(reference), -1, -1, -1).clone()
        return {"reference_key": both, "key": both[:1].clone() if len(key) == 1 else both.clone()}
    if kind in ("constant", "zero"):
        # Equal scores everywhere. Equal values too would leave the gradients nothing but rounding.
        names = ["query", "key", "reference_key", *(["value"] if kind == "zero" else [])]
        present = {name: tensor for name in names if (tensor := getattr(inputs, name)) is not None}
        return {name: torch.full_like(x, float(kind == "constant")) for name, x in present.items()}
    return {}
