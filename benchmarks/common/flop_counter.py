"""Counter of floating-point operations that knows the operators of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sefi_fast.ops.torch_library import backward_op, forward_op


def _attention_flops(query: Sequence[int], keys: int, products: int) -> int:
    batch, heads, queries, head_dim = query
    return 2 * products * batch * heads * queries * keys * head_dim


def _forward_flops(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    reference_key: Sequence[int] | None,
    *rest: Any,
    **named: Any,
) -> int:
    return _attention_flops(query, key[2], 2 if reference_key is None else 3)


def _backward_flops(
    grad_output: Any,
    grad_subject_loss: Any,
    grad_attn_probs: Any,
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    reference_key: Sequence[int] | None,
    *rest: Any,
    **named: Any,
) -> int:
    return _attention_flops(query, key[2], 5 if reference_key is None else 6)


def _forward_flops_plain(query: Sequence[int], key: Sequence[int], *rest: Any, **named: Any) -> int:
    return _attention_flops(query, key[2], 2)


def _backward_flops_plain(
    grad: Any, query: Sequence[int], key: Sequence[int], *rest: Any, **named: Any
) -> int:
    return _attention_flops(query, key[2], 5)


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter with sefi_fast's operator and the CPU's self-attention added."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            forward_op.overloadpacket: _forward_flops,
            backward_op.overloadpacket: _backward_flops,
            aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops_plain,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops_plain,
        },
    )
