"""Fresh random inputs of the operator, laid out as its users lay them out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sefi_fast.ops.inputs import AttentionInputs, Options, OutputGrads


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One call of the operator and the gradients that reach its outputs."""

    query: Tensor
    key: Tensor
    value: Tensor
    reference_key: Tensor | None
    token_weights: Tensor | None
    key_mask: Tensor | None
    probs_positions: Tensor | None
    probs_all_heads: bool
    scale: float
    reference_grad: bool
    grad_output: Tensor
    grad_subject_loss: Tensor
    grad_attn_probs: Tensor

    @property
    def tensors(self) -> AttentionInputs:
        return AttentionInputs(*(getattr(self, name) for name in AttentionInputs._fields))

    @property
    def options(self) -> Options:
        """The options of a backend's functions; every gradient that there can be is wanted."""
        needs = (True, True, True, self.reference_key is not None)
        return Options(self.probs_all_heads, self.scale, self.reference_grad, needs)

    @property
    def grads(self) -> OutputGrads:
        return OutputGrads(self.grad_output, self.grad_subject_loss, self.grad_attn_probs)

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `fused_cross_attention` for this call."""
        return {
            "reference_key": self.reference_key,
            "token_weights": self.token_weights,
            "key_mask": self.key_mask,
            "probs_positions": self.probs_positions,
            "probs_heads": "all" if self.probs_all_heads else "mean",
            "scale": self.scale,
            "reference_grad": self.reference_grad,
        }

    def double(self) -> Inputs:
        """The same numbers in float64: rounding them is not the operator's error."""
        doubled = {
            field.name: value.double()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.is_floating_point()
        }
        return dataclasses.replace(self, **doubled)

    def trainable(self) -> Inputs:
        """Leaves that share storage and strides with these tensors and require gradients."""
        names = ("query", "key", "value", "reference_key")
        leaves = {
            name: tensor.detach().requires_grad_()
            for name in names
            if (tensor := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **leaves)


def make_inputs(
    batch: int = 2,
    heads: int = 2,
    queries: int = 33,
    keys: int = 77,
    head_dim: int = 40,
    dtype: torch.dtype = torch.float32,
    *,
    reference: bool = True,
    weights: bool = False,
    mask: bool = False,
    tokens: int = 0,
    probs_all_heads: bool = False,
    broadcast_kv: bool = False,
    broadcast_reference: bool = False,
    strided: bool = True,
    reference_grad: bool = False,
    scale: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Inputs:
    """Fresh random inputs of one call.

    Args:
        weights: with token weights from 0 to 2.
        mask: with a key mask; the last of several samples may attend to nothing.
        tokens: how many columns to return; every third asks for no column (a negative entry).
        broadcast_kv, broadcast_reference: key and value, or the reference key, of batch 1; weights,
            mask and map tokens too where both hold.
        strided: [B, H, L, D] as views of wider [B, L, ...] buffers, NaN around them, so that a read
            outside shows; else contiguous.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def place(values: Tensor) -> Tensor:
        values = values.to(dtype)
        if not strided:
            return values.to(device)
        size, inner, length, width = values.shape
        # Sixteen more elements a row keep rows 16-byte aligned where they were.
        buffer = torch.full((size, length, inner * width + 16), torch.nan, dtype=dtype)
        view = buffer.to(device)[:, :, 8 : 8 + inner * width]
        view = view.unflatten(2, (inner, width)).transpose(1, 2)
        return view.copy_(values)

    kv_batch = 1 if broadcast_kv else batch
    reference_batch = 1 if broadcast_reference else batch
    extra_batch = 1 if broadcast_kv and broadcast_reference else batch
    # The order of the draws is fixed, so that switching an option on changes no other tensor.
    query = random(batch, heads, queries, head_dim)
    key = random(kv_batch, heads, keys, head_dim)
    value = random(kv_batch, heads, keys, head_dim)
    near = key if kv_batch == reference_batch else key[:1]
    reference_key = 0.8 * near + 0.6 * random(reference_batch, heads, keys, head_dim)
    grad_output = random(batch, heads, queries, head_dim)
    grad_subject_loss = random(batch)
    weight_values = 2 * torch.rand(extra_batch, keys, generator=generator)
    mask_values = torch.rand(extra_batch, keys, generator=generator) > 0.3
    if extra_batch > 1:
        mask_values[-1] = False
    token_values = torch.randint(0, keys, (extra_batch, tokens), generator=generator)
    token_values[:, 2::3] = -1
    map_shape = (batch, heads, tokens, queries) if probs_all_heads else (batch, tokens, queries)
    return Inputs(
        query=place(query),
        key=place(key),
        value=place(value),
        reference_key=place(reference_key) if reference else None,
        token_weights=weight_values.to(device) if weights else None,
        key_mask=mask_values.to(device) if mask else None,
        probs_positions=token_values.to(device) if tokens else None,
        probs_all_heads=probs_all_heads,
        scale=head_dim**-0.5 if scale is None else scale,
        reference_grad=reference_grad,
        grad_output=place(grad_output),
        grad_subject_loss=grad_subject_loss.to(device),
        grad_attn_probs=random(*map_shape).to(device),
    )
