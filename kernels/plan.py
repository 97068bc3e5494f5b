"""From layouts of tensors to tiles, grids and arguments of the kernels, found once and kept."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .backward_key_value import cross_attention_backward_key_value, sum_partials
from .backward_query import cross_attention_backward_query
from .configs import SUM_BLOCK, KernelConfig, choose_config, split_tile
from .forward import cross_attention_forward
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

SMALLEST_SCALE = 1e-30
"""Stands for a scale of 0: hidden scores are -inf, and -inf times 0 would be NaN."""

LOG2_E = math.log2(math.e)

START = 0.5
"""What a program takes besides its blocks of rows, the keys' loads above all, in such blocks."""

KEYS_START = 2.0
"""The same for the kernel of the keys: each program writes sums, which another kernel adds up."""

KEY_GRADIENTS = ("grad_key", "grad_value", "grad_reference_key")

# A plan for each layout met: all layers of a model at a few sizes are some dozens.
_kept = functools.lru_cache(maxsize=1024)


def _tiles(inputs: InputLayouts, smallest: int) -> dict[str, Any]:
    head_dim, keys = inputs.query.shape[3], inputs.key.shape[2]
    dim_main, dim_tail = split_tile(head_dim, smallest)
    key_main, key_tail = split_tile(keys, 64)
    return {
        "DIM": head_dim,
        "DIM_MAIN": dim_main,
        "DIM_TAIL": dim_tail,
        "KEY_MAIN": key_main,
        "KEY_TAIL": key_tail,
        "FULL_KEYS": keys == key_main + key_tail,
    }


def _tile_keys(tiles: dict[str, Any], keys: int, key_tile: int) -> int:
    """Put the tiles of keys that programs share into `tiles`; their number, 1 for all in one."""
    count = -(-keys // key_tile) if key_tile else 1
    if count > 1:
        tiles |= {"KEY_MAIN": key_tile, "KEY_TAIL": 0, "FULL_KEYS": keys == count * key_tile}
    tiles["KEY_TILES"] = count
    return count


def _config(
    kernel: str, inputs: InputLayouts, tiles: dict[str, Any], device: Device
) -> KernelConfig:
    return choose_config(
        kernel,
        device.capability,
        "single" if inputs.query.dtype == torch.float32 else "half",
        tiles["DIM_MAIN"] + tiles["DIM_TAIL"],
        tiles["KEY_MAIN"] + tiles["KEY_TAIL"],
        inputs.query.shape[2],
    )


def _split_rows(
    inputs: InputLayouts, config: KernelConfig, device: Device, start: float, key_tiles: int = 1
) -> tuple[int, int]:
    """(programs along the rows, blocks of rows a program) that are expected to end first.

    A multiprocessor holds config.resident programs at once, and one program more than all of them
    hold keeps most of the device waiting for it. So what counts is the turns that the programs take
    together, times what one takes: its blocks of rows and its `start`, in blocks.
    """
    batch, heads, rows, _ = inputs.query.shape
    blocks = -(-rows // config.block)
    places = config.resident * device.multiprocessors
    best = (math.inf, 0, 0)
    blocks_a_program = blocks
    while blocks_a_program > 0:
        programs = -(-blocks // blocks_a_program)
        blocks_a_program = -(-blocks // programs)
        turns = -(-batch * heads * key_tiles * programs // places)
        best = min(best, (turns * (blocks_a_program + start), programs, blocks_a_program))
        blocks_a_program -= 1
    return best[1:]


def _common(inputs: InputLayouts, tiles: dict[str, Any], scale: float) -> dict[str, Any]:
    """Numbers that all three kernels take."""
    numbers: dict[str, Any] = {}
    for name in ("query", "key", "value", "reference_key"):
        short = "reference" if name == "reference_key" else name
        row = "n" if name == "query" else "m"
        names = [f"{short}_stride_{axis}" for axis in ("b", "h", row)]
        numbers |= zip(names, steps_of(getattr(inputs, name)), strict=True)
    map_tokens = inputs.map_tokens
    return (
        numbers
        | tiles
        | {
            "weight_stride_b": batch_step(inputs.token_weights),
            "mask_stride_b": batch_step(inputs.key_mask),
            "token_stride_b": batch_step(map_tokens),
            "heads": inputs.query.shape[1],
            "rows": inputs.query.shape[2],
            "keys": inputs.key.shape[2],
            "tokens": 0 if map_tokens is None else map_tokens.shape[1],
            "scale_log2": max(scale * LOG2_E, SMALLEST_SCALE),
        }
    )


@_kept
def _prepare_forward(
    inputs: InputLayouts, scale: float, device: Device, config: KernelConfig | None
) -> Prepared:
    tiles = _tiles(inputs, 32)
    config = config or _config("forward", inputs, tiles, device)
    programs, blocks = _split_rows(inputs, config, device, START)
    batch, heads, _, head_dim = inputs.query.shape
    numbers = _common(inputs, tiles, scale) | {
        "blocks_a_program": blocks,
        "BLOCK": config.block,
        "RELOAD": config.reload,
        "ALIGNMENT": row_alignment(head_dim, *inputs[:4]),
        "UPCAST": device.interpreted and inputs.query.dtype == torch.bfloat16,
    }
    return Prepared(cross_attention_forward, (batch * heads, programs), numbers, config)


def plan_forward(
    inputs: Inputs, output: Tensor, maps: Tensor | None, scale: float, device: Device,
    config: KernelConfig | None = None,
) -> tuple[Launch, Tensor | None]:  # fmt: skip
    """The forward launch, and the partial alignments [B, H, programs] it will write, if any.

    output is [B, N, H, D] contiguous, maps [B, H, T, N] contiguous float32 or None. config stands
    in for the table's, here and below.
    """
    prepared = _prepare_forward(InputLayouts.of(inputs), scale, device, config)
    partials = None
    if inputs.reference_key is not None:
        batch, heads = inputs.query.shape[:2]
        partials = output.new_empty((batch, heads, prepared.grid[1]), dtype=torch.float32)
    tensors = inputs._asdict() | {"output": output, "alignment": partials, "maps": maps}
    return Launch(prepared, tensors), partials


def _backward_numbers(
    kernel: str, inputs: InputLayouts, gradients: GradientLayouts, scale: float, device: Device,
    config: KernelConfig | None,
) -> tuple[dict[str, Any], KernelConfig, int]:  # fmt: skip
    """Numbers shared by the two backward kernels, their configuration and the programs."""
    # In the kernel of the keys the head width is also a row count of the matrix unit, 64 at least.
    # Float32 has no matrix unit and keeps both kernels' scores equal to the last bit.
    as_rows = kernel == "backward_key_value" and inputs.query.dtype != torch.float32
    tiles = _tiles(inputs, 64 if as_rows else 32)
    config = config or _config(kernel, inputs, tiles, device)
    key_tiles, start = 1, START
    if kernel == "backward_key_value":
        key_tiles, start = _tile_keys(tiles, inputs.key.shape[2], config.key_tile), KEYS_START
    programs, blocks = _split_rows(inputs, config, device, start, key_tiles)
    heads, _, head_dim = inputs.query.shape[1:]
    maps = gradients.maps
    all_heads = maps is not None and len(maps.shape) == 4
    output_steps = steps_of(gradients.output)
    numbers = _common(inputs, tiles, scale) | {
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


@_kept
def _prepare_backward_query(
    inputs: InputLayouts, gradients: GradientLayouts, scale: float, reference_grad: bool,
    device: Device, config: KernelConfig | None,
) -> Prepared:  # fmt: skip
    numbers, config, programs = _backward_numbers(
        "backward_query", inputs, gradients, scale, device, config
    )
    numbers["REFERENCE_GRAD"] = reference_grad and gradients.alignment is not None
    batch, heads = inputs.query.shape[:2]
    return Prepared(cross_attention_backward_query, (batch * heads, programs), numbers, config)


def plan_backward_query(
    inputs: Inputs, gradients: Gradients, grad_query: Tensor | None, statistics: Tensor | None,
    scale: float, reference_grad: bool, device: Device, config: KernelConfig | None = None,
) -> Launch:  # fmt: skip
    """The launch that writes grad_query, [B, N, H, D] contiguous, and the statistics of its rows.

    statistics, [B, H, 6, N] contiguous float32, are what the kernel of the keys needs.
    """
    layouts = GradientLayouts.of(gradients)
    prepared = _prepare_backward_query(
        InputLayouts.of(inputs), layouts, scale, reference_grad, device, config
    )
    tensors = _gradient_tensors(inputs, gradients)
    return Launch(prepared, tensors | {"grad_query": grad_query, "statistics": statistics})


@_kept
def _prepare_backward_key_value(
    inputs: InputLayouts, gradients: GradientLayouts, scale: float, device: Device,
    config: KernelConfig | None,
) -> Prepared:  # fmt: skip
    numbers, config, splits = _backward_numbers(
        "backward_key_value", inputs, gradients, scale, device, config
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
    layouts = GradientLayouts.of(gradients)
    prepared = _prepare_backward_key_value(InputLayouts.of(inputs), layouts, scale, device, config)
    batch, heads, _, head_dim = inputs.query.shape
    splits = prepared.grid[1]
    tensors = _gradient_tensors(inputs, gradients) | {"statistics": statistics}
    partials: list[Tensor | None] = []
    for total in totals:
        direct = total is None or (splits == 1 and total.shape[0] == batch)
        shape = (batch, splits, inputs.key.shape[2], heads, head_dim)
        partials.append(total if direct else total.new_empty(shape, dtype=torch.float32))  # type: ignore[union-attr]
    parts = [dict(zip(KEY_GRADIENTS, partials, strict=True))]
    if prepared.config.separate:
        parts = [{name: partial} for name, partial in parts[0].items() if partial is not None]
    launches = [Launch(prepared, tensors | part) for part in parts]
    pairs = [(p, t) for p, t in zip(partials, totals, strict=True) if p is not t]
    for groups in sorted({t.shape[0] for _, t in pairs}):  # type: ignore[union-attr]
        chosen = [(p, t) for p, t in pairs if t.shape[0] == groups]  # type: ignore[union-attr]
        launches.append(_plan_sum(chosen, batch * splits // groups, device))
    return launches


@_kept
def _prepare_sum(
    elements: int, groups: int, gradients: int, dtype: torch.dtype, count: int, device: Device
) -> Prepared:
    """dtype and device are not read: kernels of other ones are others."""
    numbers = {"elements": elements, "count": count, "BLOCK": SUM_BLOCK}
    grid = (-(-elements // SUM_BLOCK), groups, gradients)
    return Prepared(sum_partials, grid, numbers, KernelConfig(SUM_BLOCK, 4, 1))


def _plan_sum(
    pairs: list[tuple[Tensor | None, Tensor | None]], count: int, device: Device
) -> Launch:
    """The launch that adds up `count` partial sums of up to three gradients of equal shape."""
    total = pairs[0][1]
    assert total is not None
    prepared = _prepare_sum(
        total.numel() // total.shape[0], total.shape[0], len(pairs), total.dtype, count, device
    )
    tensors: dict[str, Tensor | None] = {}
    for place, (partial, into) in zip(("first", "second", "third"), pairs, strict=False):
        tensors |= {f"{place}_partials": partial, f"{place}_total": into}
    return Launch(prepared, tensors)
