"""Host side of the kernels: from tensors to tiles, grids and arguments, one plan a launch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backward_key_value import cross_attention_backward_key_value, sum_partials
from .backward_query import cross_attention_backward_query
from .configs import PROGRAMS, SUM_BLOCK, KernelConfig, choose_config, split_tile
from .forward import cross_attention_forward

MAX_ROW_STRIDE = 2**31 // 256 - 1
"""Largest step between rows, in elements: a tile has up to 256 rows and 32-bit offsets in it."""

SMALLEST_SCALE = 1e-30
"""Stands for a scale of 0: hidden scores are -inf, and -inf times 0 would be NaN."""

LOG2_E = math.log2(math.e)


class Device(NamedTuple):
    """What a plan must know of the device: capability · 10, multiprocessors, interpreted or not."""

    capability: int
    multiprocessors: int
    interpreted: bool


class Launch(NamedTuple):
    """One kernel with its grid and all its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: KernelConfig

    def run(self) -> None:
        """Start the kernel on the current device and stream."""
        self.kernel[self.grid](
            **self.arguments, num_warps=self.config.warps, num_stages=self.config.stages
        )

    def compile(self) -> None:
        """Compile for these arguments and the current device into Triton's cache; nothing runs."""
        self.kernel.warmup(
            **self.arguments, grid=self.grid,
            num_warps=self.config.warps, num_stages=self.config.stages,
        )  # fmt: skip


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


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and row in elements; 0 along an axis of one entry."""
    if tensor is None:
        return 0, 0, 0
    return tuple(0 if tensor.shape[axis] == 1 else tensor.stride(axis) for axis in range(3))  # type: ignore[return-value]


def _batch_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def _alignment(head_dim: int, *tensors: Tensor | None) -> int:
    """Elements of 16 bytes if every row of every tensor starts at a multiple of them, else 1."""
    present = [tensor for tensor in tensors if tensor is not None]
    elements = 16 // present[0].element_size()
    steps = [head_dim, *(stride for tensor in present for stride in _strides(tensor))]
    return elements if all(step % elements == 0 for step in steps) else 1


def _tiles(inputs: Inputs, smallest: int) -> dict[str, Any]:
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


def _config(kernel: str, inputs: Inputs, tiles: dict[str, Any], device: Device) -> KernelConfig:
    return choose_config(
        kernel,
        device.capability,
        "single" if inputs.query.dtype == torch.float32 else "half",
        tiles["DIM_MAIN"] + tiles["DIM_TAIL"],
        tiles["KEY_MAIN"] + tiles["KEY_TAIL"],
        inputs.query.shape[2],
    )


def _split_rows(
    kernel: str, inputs: Inputs, block: int, device: Device, key_tiles: int = 1
) -> tuple[int, int]:
    """(programs along the rows, blocks of rows a program): about one wave of resident programs."""
    batch, heads, rows, _ = inputs.query.shape
    blocks = -(-rows // block)
    wanted = max(1, PROGRAMS[kernel] * device.multiprocessors // (batch * heads * key_tiles))
    blocks_a_program = -(-blocks // min(wanted, blocks))
    return -(-blocks // blocks_a_program), blocks_a_program


def _common(inputs: Inputs, tiles: dict[str, Any], scale: float) -> dict[str, Any]:
    """Arguments that all three kernels take."""
    arguments: dict[str, Any] = inputs._asdict()
    for name in ("query", "key", "value", "reference_key"):
        short = "reference" if name == "reference_key" else name
        row = "n" if name == "query" else "m"
        strides = _strides(arguments[name])
        names = [f"{short}_stride_{axis}" for axis in ("b", "h", row)]
        arguments |= zip(names, strides, strict=True)
    map_tokens = inputs.map_tokens
    return (
        arguments
        | tiles
        | {
            "weight_stride_b": _batch_stride(inputs.token_weights),
            "mask_stride_b": _batch_stride(inputs.key_mask),
            "token_stride_b": _batch_stride(map_tokens),
            "heads": inputs.query.shape[1],
            "rows": inputs.query.shape[2],
            "keys": inputs.key.shape[2],
            "tokens": 0 if map_tokens is None else map_tokens.shape[1],
            "scale_log2": max(scale * LOG2_E, SMALLEST_SCALE),
        }
    )


def plan_forward(
    inputs: Inputs, output: Tensor, maps: Tensor | None, scale: float, device: Device,
    config: KernelConfig | None = None,
) -> tuple[Launch, Tensor | None]:  # fmt: skip
    """The forward launch, and the partial alignments [B, H, programs] it will write, if any.

    output is [B, N, H, D] contiguous, maps [B, H, T, N] contiguous float32 or None. config stands
    in for the table's, here and below.
    """
    tiles = _tiles(inputs, 32)
    config = config or _config("forward", inputs, tiles, device)
    programs, blocks = _split_rows("forward", inputs, config.block, device)
    batch, heads, _, head_dim = inputs.query.shape
    partials = None
    if inputs.reference_key is not None:
        partials = output.new_empty((batch, heads, programs), dtype=torch.float32)
    arguments = _common(inputs, tiles, scale) | {
        "output": output,
        "alignment": partials,
        "maps": maps,
        "blocks_a_program": blocks,
        "BLOCK": config.block,
        "RELOAD": config.reload,
        "ALIGNMENT": _alignment(head_dim, *inputs[:4]),
        "UPCAST": device.interpreted and inputs.query.dtype == torch.bfloat16,
    }
    return Launch(cross_attention_forward, (batch * heads, programs), arguments, config), partials


class Gradients(NamedTuple):
    """The gradients that reach the operator: of output, alignment and maps, each may be None.

    maps is [B, T, N] or [B, H, T, N], contiguous; alignment has any stride.
    """

    output: Tensor | None
    alignment: Tensor | None
    maps: Tensor | None


def _backward_arguments(
    kernel: str, inputs: Inputs, gradients: Gradients, scale: float, device: Device,
    config: KernelConfig | None,
) -> tuple[dict[str, Any], KernelConfig, int]:  # fmt: skip
    """Arguments shared by the two backward kernels, their configuration and the programs."""
    # In the kernel of the keys the head width is also a row count of the matrix unit, 64 at least.
    # Float32 has no matrix unit and keeps both kernels' scores equal to the last bit.
    as_rows = kernel == "backward_key_value" and inputs.query.dtype != torch.float32
    tiles = _tiles(inputs, 64 if as_rows else 32)
    config = config or _config(kernel, inputs, tiles, device)
    key_tiles = 1
    if kernel == "backward_key_value":
        key_tiles = _tile_keys(tiles, inputs.key.shape[2], config.key_tile)
    programs, blocks = _split_rows(kernel, inputs, config.block, device, key_tiles)
    head_dim = inputs.query.shape[3]
    maps = gradients.maps
    all_heads = maps is not None and maps.dim() == 4
    output_strides = _strides(gradients.output)
    arguments = _common(inputs, tiles, scale) | {
        "grad_output": gradients.output,
        "grad_alignment": gradients.alignment,
        "grad_maps": maps,
        "output_stride_b": output_strides[0],
        "output_stride_h": output_strides[1],
        "output_stride_n": output_strides[2],
        "alignment_stride_b": _batch_stride(gradients.alignment),
        "map_stride_b": 0 if maps is None else maps.stride(0),
        "map_stride_h": maps.stride(1) if maps is not None and all_heads else 0,
        "map_factor": 1.0 if all_heads else 1.0 / inputs.query.shape[1],
        "blocks_a_program": blocks,
        "scale": scale,
        "BLOCK": config.block,
        "RELOAD": config.reload,
        "ALIGNMENT": _alignment(head_dim, *inputs[:4], gradients.output),
        "UPCAST": device.interpreted and inputs.query.dtype == torch.bfloat16,
    }
    return arguments, config, programs


def plan_backward_query(
    inputs: Inputs, gradients: Gradients, grad_query: Tensor | None, statistics: Tensor | None,
    scale: float, reference_grad: bool, device: Device, config: KernelConfig | None = None,
) -> Launch:  # fmt: skip
    """The launch that writes grad_query, [B, N, H, D] contiguous, and the statistics of its rows.

    statistics, [B, H, 6, N] contiguous float32, are what the kernel of the keys needs.
    """
    arguments, config, programs = _backward_arguments(
        "backward_query", inputs, gradients, scale, device, config
    )
    arguments |= {
        "grad_query": grad_query,
        "statistics": statistics,
        "REFERENCE_GRAD": reference_grad and gradients.alignment is not None,
    }
    batch, heads = inputs.query.shape[:2]
    return Launch(cross_attention_backward_query, (batch * heads, programs), arguments, config)


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
    arguments, config, splits = _backward_arguments(
        "backward_key_value", inputs, gradients, scale, device, config
    )
    batch, heads, _, head_dim = inputs.query.shape
    arguments["statistics"] = statistics
    grid = (batch * heads * arguments["KEY_TILES"], splits)
    names = ("grad_key", "grad_value", "grad_reference_key")
    kernel = cross_attention_backward_key_value
    partials: list[Tensor | None] = []
    for total in totals:
        direct = total is None or (splits == 1 and total.shape[0] == batch)
        shape = (batch, splits, inputs.key.shape[2], heads, head_dim)
        partials.append(total if direct else total.new_empty(shape, dtype=torch.float32))  # type: ignore[union-attr]
    none: dict[str, Tensor | None] = dict.fromkeys(names)
    parts = [dict(zip(names, partials, strict=True))]
    if config.separate:
        parts = [{name: partial} for name, partial in parts[0].items() if partial is not None]
    launches = [Launch(kernel, grid, arguments | none | part, config) for part in parts]
    pairs = [(p, t) for p, t in zip(partials, totals, strict=True) if p is not t]
    for groups in sorted({t.shape[0] for _, t in pairs}):  # type: ignore[union-attr]
        chosen = [(p, t) for p, t in pairs if t.shape[0] == groups]  # type: ignore[union-attr]
        launches.append(_plan_sum(chosen, batch * splits // groups))
    return launches


def _plan_sum(pairs: list[tuple[Tensor | None, Tensor | None]], count: int) -> Launch:
    """The launch that adds up `count` partial sums of up to three gradients of equal shape."""
    total = pairs[0][1]
    assert total is not None
    padded = pairs + [(None, None)] * (3 - len(pairs))
    arguments: dict[str, Any] = {"elements": total[0].numel(), "count": count, "BLOCK": SUM_BLOCK}
    for place, (partial, into) in zip(("first", "second", "third"), padded, strict=True):
        arguments |= {f"{place}_partials": partial, f"{place}_total": into}
    grid = (-(-total[0].numel() // SUM_BLOCK), total.shape[0], len(pairs))
    return Launch(sum_partials, grid, arguments, KernelConfig(SUM_BLOCK, 4, 1))
