"""Triton kernels of the fused cross-attention and their launch plans."""

from __future__ import annotations

from .configs import KernelConfig, shared_bytes, split_tile
from .launch import Device, Launch
from .plan import (
    MAX_ROW_STRIDE,
    empty_row_stats,
    plan_backward,
    plan_backward_fused,
    plan_backward_key_value,
    plan_backward_query,
    plan_forward,
)

__all__ = [
    "MAX_ROW_STRIDE",
    "Device",
    "KernelConfig",
    "Launch",
    "empty_row_stats",
    "plan_backward",
    "plan_backward_fused",
    "plan_backward_key_value",
    "plan_backward_query",
    "plan_forward",
    "shared_bytes",
    "split_tile",
]
