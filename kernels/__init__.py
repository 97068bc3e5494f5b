"""Triton kernels of the fused cross-attention and their launch plans."""

from __future__ import annotations

from .configs import KernelConfig, shared_bytes, split_tile
from .launch import Device, Launch
from .plan import (
    MAX_ROW_STRIDE,
    Gradients,
    Inputs,
    empty_statistics,
    plan_backward,
    plan_backward_key_value,
    plan_backward_query,
    plan_backward_sums,
    plan_forward,
)

__all__ = [
    "MAX_ROW_STRIDE",
    "Device",
    "Gradients",
    "Inputs",
    "KernelConfig",
    "Launch",
    "empty_statistics",
    "plan_backward",
    "plan_backward_key_value",
    "plan_backward_query",
    "plan_backward_sums",
    "plan_forward",
    "shared_bytes",
    "split_tile",
]
