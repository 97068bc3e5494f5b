"""Triton kernels of the fused cross-attention and their launch plans."""

from __future__ import annotations

from .launch import (
    Device,
    Gradients,
    Inputs,
    Launch,
    plan_backward_key_value,
    plan_backward_query,
    plan_forward,
)

__all__ = [
    "Device",
    "Gradients",
    "Inputs",
    "Launch",
    "plan_backward_key_value",
    "plan_backward_query",
    "plan_forward",
]
