"""The operator's tensors as a backend gets them, and of their layouts what a plan depends on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_ROW_STRIDE = 2**31 // 256 - 1
"""Largest step between rows, in elements: a tile has up to 256 rows and 32-bit offsets in it."""


class Inputs(NamedTuple):
    """The operator's inputs as a backend gets them; key and the like may be batch 1.

    The backward pass leaves out what no gradient needs, value among it.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    reference_key: Tensor | None
    token_weights: Tensor | None
    key_mask: Tensor | None
    map_tokens: Tensor | None


class Gradients(NamedTuple):
    """The gradients that reach the operator: of output, alignment and maps, each may be None.

    maps is [B, T, N] or [B, H, T, N], contiguous; alignment has any stride.
    """

    output: Tensor | None
    alignment: Tensor | None
    maps: Tensor | None


class Layout(NamedTuple):
    """All of a tensor that a plan depends on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def steps(self) -> tuple[int, int, int]:
        """Strides of batch, head and row in elements; 0 along an axis of one entry."""
        batch, head, row = (
            0 if size == 1 else stride
            for size, stride in zip(self.shape[:3], self.strides[:3], strict=True)
        )
        return batch, head, row


class InputLayouts(NamedTuple):
    """Layouts of Inputs."""

    query: Layout
    key: Layout
    value: Layout | None
    reference_key: Layout | None
    token_weights: Layout | None
    key_mask: Layout | None
    map_tokens: Layout | None

    @classmethod
    def of(cls, inputs: Inputs) -> InputLayouts:
        return cls(*map(_layout, inputs))


class GradientLayouts(NamedTuple):
    """Layouts of Gradients."""

    output: Layout | None
    alignment: Layout | None
    maps: Layout | None

    @classmethod
    def of(cls, gradients: Gradients) -> GradientLayouts:
        return cls(*map(_layout, gradients))


def _layout(tensor: Tensor | None) -> Any:
    return None if tensor is None else Layout(tensor.shape, tensor.stride(), tensor.dtype)


def steps_of(layout: Layout | None) -> tuple[int, int, int]:
    """Strides of batch, head and row; zeros for a tensor that is not there."""
    return (0, 0, 0) if layout is None else layout.steps()


def batch_step(layout: Layout | None) -> int:
    """Stride of the first axis; 0 where it has one entry or there is no tensor."""
    return 0 if layout is None or layout.shape[0] == 1 else layout.strides[0]


def row_alignment(head_dim: int, *layouts: Layout | None) -> int:
    """Elements of 16 bytes if every row of every tensor starts at a multiple of them, else 1."""
    present = [layout for layout in layouts if layout is not None]
    elements = 16 // present[0].dtype.itemsize
    steps = [head_dim, *(step for layout in present for step in layout.steps())]
    return elements if all(step % elements == 0 for step in steps) else 1
