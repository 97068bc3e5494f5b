"""Plans of the backward kernels: which of them a call takes, and their launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tiling
from .backward_key_value import cross_attention_backward_key_value
from .backward_query import cross_attention_backward_query
from .configs import SUM_COLUMNS, KernelConfig
from .launch import Device, Launch, Prepared
from .layouts import (
    GradientLayouts,
    Gradients,
    InputLayouts,
    Inputs,
    batch_step,
    row_alignment,
    steps_of,
)
from .memory import STATISTICS
from .totals import sum_partials

KEY_GRADIENTS = ("grad_key", "grad_value", "grad_reference_key")


class _Partial(NamedTuple):
    """What the programs of a launch leave of one gradient: `count` sums for each batch of total."""

    sums: Tensor
    total: Tensor
    count: int


def _backward_numbers(
    kernel: str, inputs: InputLayouts, gradients: GradientLayouts, scale: float,
    reference_grad: bool, device: Device, config: KernelConfig | None,
) -> tuple[dict[str, Any], KernelConfig, int]:  # fmt: skip
    """Numbers shared by the backward kernels, their configuration and the programs."""
    tiles = tiling.tiles_of(kernel, inputs, device)
    masked = kernel == "backward_key_value" and inputs.key_mask is not None
    pipeline = gradients.maps is None and not reference_grad and not masked
    config = config or tiling.config_of(kernel, inputs, tiles, device, pipeline)
    key_tiles = 1
    if kernel == "backward_key_value":
        key_tiles = tiling.tile_keys(tiles, inputs.key.shape[2], config.key_tile)
    programs, blocks = tiling.split_rows(inputs, config, device, key_tiles)
    heads, _, head_dim = inputs.query.shape[1:]
    maps = gradients.maps
    all_heads = maps is not None and len(maps.shape) == 4
    output_steps = steps_of(gradients.output)
    numbers = tiling.common_numbers(inputs, tiles, scale) | {
        "output_stride_b": output_steps[0],
        "output_stride_h": output_steps[1],
        "output_stride_n": output_steps[2],
        "alignment_stride_b": batch_step(gradients.alignment),
        "map_stride_b": 0 if maps is None else maps.strides[0],
        "map_stride_h": maps.strides[1] if maps is not None and all_heads else 0,
        "map_factor": 1.0 if all_heads else 1.0 / heads,
        "blocks_a_program": blocks,
        "scale": scale,
        "BLOCK": config.block,
        "RELOAD": config.reload,
        "PIPELINED": config.pipelined,
        "ALIGNMENT": row_alignment(head_dim, *inputs[:4], gradients.output),
        "UPCAST": device.interpreted and inputs.query.dtype == torch.bfloat16,
    }
    return numbers, config, programs


def _gradient_tensors(inputs: Inputs, gradients: Gradients) -> dict[str, Tensor | None]:
    return inputs._asdict() | {
        "grad_output": gradients.output,
        "grad_alignment": gradients.alignment,
        "grad_maps": gradients.maps,
    }


@tiling.kept
def _prepare_backward_query(
    kernel: str, inputs: InputLayouts, gradients: GradientLayouts, scale: float,
    reference_grad: bool, device: Device, config: KernelConfig | None,
) -> Prepared:  # fmt: skip
    reference_grad = reference_grad and gradients.alignment is not None
    numbers, config, programs = _backward_numbers(
        kernel, inputs, gradients, scale, reference_grad, device, config
    )
    numbers["REFERENCE_GRAD"] = reference_grad
    numbers["PREFETCH"] = config.prefetch
    numbers["LATE"] = config.late or (config.reload and not config.pipelined)
    batch, heads = inputs.query.shape[:2]
    return Prepared(cross_attention_backward_query, (batch * heads, programs), numbers, config)


def empty_statistics(query: Tensor) -> Tensor:
    """The float32 buffer [B, H, N, 8] from the kernel of the queries to that of the keys."""
    batch, heads, rows, _ = query.shape
    return query.new_empty((batch, heads, rows, STATISTICS.value), dtype=torch.float32)


def plan_backward_query(
    inputs: Inputs, gradients: Gradients, grad_query: Tensor | None, statistics: Tensor | None,
    scale: float, reference_grad: bool, device: Device, config: KernelConfig | None = None,
) -> Launch:  # fmt: skip
    """The launch that writes grad_query, [B, N, H, D] contiguous, and the statistics of its rows.

    statistics, as `empty_statistics` makes them, are what the kernel of the keys needs. config
    stands in for the table's, here and below.
    """
    layouts = GradientLayouts.of(gradients)
    prepared = _prepare_backward_query(
        "backward_query", InputLayouts.of(inputs), layouts, scale, reference_grad, device, config
    )
    tensors = _gradient_tensors(inputs, gradients)
    return Launch(prepared, tensors | {"grad_query": grad_query, "statistics": statistics})


def plan_backward_sums(
    inputs: Inputs, gradients: Gradients, grad_query: Tensor | None, statistics: Tensor | None,
    totals: tuple[Tensor | None, Tensor | None], scale: float, reference_grad: bool,
    device: Device, config: KernelConfig,
) -> list[Launch]:  # fmt: skip
    """The launches that write what `plan_backward_query` does, and the gradients of key and value.

    totals are as for `plan_backward_key_value`; config says that the kernel sums them up.
    """
    launch, partials = _backward_sums(
        inputs, gradients, grad_query, statistics, totals, scale, reference_grad, device, config
    )
    return [launch, *_plan_sums(partials, device)]


def _backward_sums(
    inputs: Inputs, gradients: Gradients, grad_query: Tensor | None, statistics: Tensor | None,
    totals: tuple[Tensor | None, Tensor | None], scale: float, reference_grad: bool,
    device: Device, config: KernelConfig,
) -> tuple[Launch, list[_Partial]]:  # fmt: skip
    layouts = GradientLayouts.of(gradients)
    prepared = _prepare_backward_query(
        "backward", InputLayouts.of(inputs), layouts, scale, reference_grad, device, config
    )
    written, partials = _partials(inputs, totals, prepared.grid[1])
    tensors = _gradient_tensors(inputs, gradients) | {
        "grad_query": grad_query,
        "grad_key": written[0],
        "grad_value": written[1],
        "statistics": statistics,
    }
    return Launch(prepared, tensors), partials


@tiling.kept
def _prepare_backward_key_value(
    inputs: InputLayouts, gradients: GradientLayouts, scale: float, reference_grad: bool,
    device: Device, config: KernelConfig | None,
) -> Prepared:  # fmt: skip
    numbers, config, splits = _backward_numbers(
        "backward_key_value", inputs, gradients, scale, reference_grad, device, config
    )
    batch, heads = inputs.query.shape[:2]
    grid = (batch * heads * numbers["KEY_TILES"], splits)
    return Prepared(cross_attention_backward_key_value, grid, numbers, config)


def plan_backward_key_value(
    inputs: Inputs, gradients: Gradients, statistics: Tensor,
    totals: tuple[Tensor | None, Tensor | None, Tensor | None], scale: float, device: Device,
    config: KernelConfig | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches that write the gradients of key, value and reference key.

    totals are [B or 1, M, H, D] contiguous or None where not wanted, at least one is wanted. A
    batch of 1 under a larger batch of queries gets the sum over it. Without more than one partial
    sum a gradient, the first kernel writes the totals itself.
    """
    launches, partials = _backward_key_value(
        inputs, gradients, statistics, totals, scale, device, config
    )
    return launches + _plan_sums(partials, device)


def _backward_key_value(
    inputs: Inputs, gradients: Gradients, statistics: Tensor,
    totals: tuple[Tensor | None, Tensor | None, Tensor | None], scale: float, device: Device,
    config: KernelConfig | None,
) -> tuple[list[Launch], list[_Partial]]:  # fmt: skip
    layouts = GradientLayouts.of(gradients)
    prepared = _prepare_backward_key_value(
        InputLayouts.of(inputs), layouts, scale, totals[2] is not None, device, config
    )
    written, partials = _partials(inputs, totals, prepared.grid[1])
    tensors = _gradient_tensors(inputs, gradients) | {"statistics": statistics}
    parts = [dict(zip(KEY_GRADIENTS, written, strict=True))]
    if prepared.config.separate:
        parts = [{name: each} for name, each in parts[0].items() if each is not None]
    return [Launch(prepared, tensors | part) for part in parts], partials


def plan_backward(
    inputs: Inputs, gradients: Gradients,
    totals: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    scale: float, reference_grad: bool, device: Device,
) -> list[Launch]:  # fmt: skip
    """The launches that write the gradients of query, key, value and reference key.

    totals are as for `plan_backward_query` and `plan_backward_key_value`, one at least is wanted.
    """
    grad_query, *of_keys = totals
    config = tiling.sums_config(InputLayouts.of(inputs), device)
    summed: list[Tensor | None] = [None, None]
    # Without dK the sums would leave the greater part to the kernel of the keys.
    if config is not None and of_keys[0] is not None:
        summed[: config.sums] = of_keys[: config.sums]
        of_keys[: config.sums] = [None] * config.sums
    statistics = None
    if any(total is not None for total in of_keys):
        statistics = empty_statistics(inputs.query)
    partials: list[_Partial] = []
    if summed[0] is None:
        launches = [
            plan_backward_query(
                inputs, gradients, grad_query, statistics, scale, reference_grad, device
            )
        ]
    else:
        assert config is not None
        launch, partials = _backward_sums(
            inputs, gradients, grad_query, statistics, (summed[0], summed[1]), scale,
            reference_grad, device, config,
        )  # fmt: skip
        launches = [launch]
    if statistics is not None:
        wanted = (of_keys[0], of_keys[1], of_keys[2])
        more, others = _backward_key_value(
            inputs, gradients, statistics, wanted, scale, device, None
        )
        launches += more
        partials += others
    return launches + _plan_sums(partials, device)


def _partials(
    inputs: Inputs, totals: Sequence[Tensor | None], splits: int
) -> tuple[list[Tensor | None], list[_Partial]]:
    """What the programs write for each total, and what is to be added up then.

    They write the total itself where each of its batches has one sum.
    """
    batch, heads, _, head_dim = inputs.query.shape
    shape = (batch, splits, inputs.key.shape[2], heads, head_dim)
    written: list[Tensor | None] = []
    partials = []
    for total in totals:
        if total is None or (splits == 1 and total.shape[0] == batch):
            written.append(total)
            continue
        sums = total.new_empty(shape, dtype=torch.float32)
        written.append(sums)
        partials.append(_Partial(sums, total, batch * splits // total.shape[0]))
    return written, partials


def _plan_sums(partials: Sequence[_Partial], device: Device) -> list[Launch]:
    """The launches that add up partial sums into the totals, those of one kind together."""
    kinds: dict[tuple[int, int], list[_Partial]] = {}
    for partial in partials:
        kinds.setdefault((partial.total.shape[0], partial.count), []).append(partial)
    return [_plan_sum(kind, device) for _, kind in sorted(kinds.items())]


@tiling.kept
def _prepare_sum(
    elements: int, groups: int, gradients: int, dtype: torch.dtype, count: int, device: Device
) -> Prepared:
    """dtype is not read: kernels of another one are others."""
    ahead = next(size for size in (2, 4, 8, 16) if size >= min(count, 16))
    # Small programs where larger ones would leave multiprocessors without any.
    places = 2 * device.multiprocessors
    warps = 4 if elements * groups * gradients >= SUM_COLUMNS[4] * places else 1
    block = SUM_COLUMNS[warps]
    numbers = {"elements": elements, "count": count, "BLOCK": block, "AHEAD": ahead}
    grid = (-(-elements // block), groups, gradients)
    return Prepared(sum_partials, grid, numbers, KernelConfig(block, warps, 1))


def _plan_sum(partials: Sequence[_Partial], device: Device) -> Launch:
    """The launch that adds up the partial sums of up to three gradients of equal shape."""
    _, total, count = partials[0]
    prepared = _prepare_sum(
        total.numel() // total.shape[0], total.shape[0], len(partials), total.dtype, count, device
    )
    tensors: dict[str, Tensor | None] = {}
    for place, (sums, into, _) in zip(("first", "second", "third"), partials, strict=False):
        tensors |= {f"{place}_partials": sums, f"{place}_total": into}
    return Launch(prepared, tensors)
