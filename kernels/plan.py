"""Plan launches: layouts, tiles, split of the rows, and the arguments of each kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attn_bwd_dkdv import cross_attention_backward_key_value
from .attn_bwd_dq import cross_attention_backward_query
from .attn_fwd import cross_attention_forward
from .configs import (
    SUM_COLUMNS,
    KernelConfig,
    choose_config,
    choose_sums,
    smallest_tile,
    split_tile,
)
from .launch import Device, Launch, Prepared
from .memory import STATISTICS
from .reduce import sum_partials

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
    probs_positions: Tensor | None


class Gradients(NamedTuple):
    """The gradients that reach the operator: of output, subject loss and maps, each may be None.

    maps is [B, T, N] or [B, H, T, N], contiguous; subject loss has any stride.
    """

    output: Tensor | None
    subject_loss: Tensor | None
    attn_probs: Tensor | None


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
    probs_positions: Layout | None

    @classmethod
    def of(cls, inputs: Inputs) -> InputLayouts:
        return cls(*map(_layout, inputs))


class GradientLayouts(NamedTuple):
    """Layouts of Gradients."""

    output: Layout | None
    subject_loss: Layout | None
    attn_probs: Layout | None

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


SMALLEST_SCALE = 1e-30
"""Stands for a scale of 0: hidden scores are -inf, and -inf times 0 would be NaN."""

LOG2_E = math.log2(math.e)

START = 1.5
"""What a program takes besides its blocks of rows, in such blocks: the keys' loads, code that is
not in the cache yet, the sums it leaves. From what an H200 took for programs of few and of many."""

# A plan for each layout met: all layers of a model at a few sizes are some dozens.
kept = functools.lru_cache(maxsize=1024)


def precision_of(inputs: InputLayouts) -> str:
    return "single" if inputs.query.dtype == torch.float32 else "half"


def tiles_of(kernel: str, inputs: InputLayouts, device: Device) -> dict[str, Any]:
    head_dim, keys = inputs.query.shape[3], inputs.key.shape[2]
    smallest = smallest_tile(kernel, precision_of(inputs), device.capability)
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


def tile_keys(tiles: dict[str, Any], keys: int, key_tile: int) -> int:
    """Put the tiles of keys that programs share into `tiles`; their number, 1 for all in one."""
    count = -(-keys // key_tile) if key_tile else 1
    if count > 1:
        tiles |= {"KEY_MAIN": key_tile, "KEY_TAIL": 0, "FULL_KEYS": keys == count * key_tile}
    tiles["KEY_TILES"] = count
    return count


def _place(
    inputs: InputLayouts, tiles: dict[str, Any], device: Device
) -> tuple[int, str, int, int]:
    """Where the table of configurations is looked up: what `choose_config` takes after a kernel."""
    return (
        device.capability,
        precision_of(inputs),
        tiles["DIM_MAIN"] + tiles["DIM_TAIL"],
        tiles["KEY_MAIN"] + tiles["KEY_TAIL"],
    )


def config_of(
    kernel: str, inputs: InputLayouts, tiles: dict[str, Any], device: Device, pipeline: bool
) -> KernelConfig:
    return choose_config(kernel, *_place(inputs, tiles, device), pipeline)


@kept
def sums_config(inputs: InputLayouts, device: Device) -> KernelConfig | None:
    """With what the kernel of the queries sums up dK, and dV, as well; None where it does not."""
    return choose_sums(*_place(inputs, tiles_of("backward", inputs, device), device))


def split_rows(
    inputs: InputLayouts, config: KernelConfig, device: Device, key_tiles: int = 1
) -> tuple[int, int]:
    """(programs along the rows, blocks of rows a program) that are expected to end first.

    A multiprocessor holds config.resident programs at once, and one program more than all of them
    hold keeps most of the device waiting for it. So what counts is the turns that the programs take
    together, times what one takes: its blocks of rows and its START.
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
        best = min(best, (turns * (blocks_a_program + START), programs, blocks_a_program))
        blocks_a_program -= 1
    return best[1:]


def common_numbers(inputs: InputLayouts, tiles: dict[str, Any], scale: float) -> dict[str, Any]:
    """Numbers that all kernels of rows take."""
    numbers: dict[str, Any] = {}
    for name in ("query", "key", "value", "reference_key"):
        short = "reference" if name == "reference_key" else name
        row = "n" if name == "query" else "m"
        names = [f"{short}_stride_{axis}" for axis in ("b", "h", row)]
        numbers |= zip(names, steps_of(getattr(inputs, name)), strict=True)
    probs_positions = inputs.probs_positions
    return (
        numbers
        | tiles
        | {
            "weight_stride_b": batch_step(inputs.token_weights),
            "mask_stride_b": batch_step(inputs.key_mask),
            "token_stride_b": batch_step(probs_positions),
            "heads": inputs.query.shape[1],
            "rows": inputs.query.shape[2],
            "keys": inputs.key.shape[2],
            "tokens": 0 if probs_positions is None else probs_positions.shape[1],
            "scale_log2": max(scale * LOG2_E, SMALLEST_SCALE),
        }
    )


@kept
def _prepare_forward(
    inputs: InputLayouts, scale: float, device: Device, config: KernelConfig | None
) -> Prepared:
    tiles = tiles_of("forward", inputs, device)
    config = config or config_of(
        "forward", inputs, tiles, device, pipeline=inputs.probs_positions is None
    )
    programs, blocks = split_rows(inputs, config, device)
    batch, heads, _, head_dim = inputs.query.shape
    numbers = common_numbers(inputs, tiles, scale) | {
        "blocks_a_program": blocks,
        "BLOCK": config.block,
        "RELOAD": config.reload,
        "ALIGNMENT": row_alignment(head_dim, *inputs[:4]),
        "UPCAST": device.interpreted and inputs.query.dtype == torch.bfloat16,
    }
    return Prepared(cross_attention_forward, (batch * heads, programs), numbers, config)


def plan_forward(
    inputs: Inputs, output: Tensor, attn_probs: Tensor | None, scale: float, device: Device,
    config: KernelConfig | None = None,
) -> tuple[Launch, Tensor | None]:  # fmt: skip
    """The forward launch, and the partial subject_losses [B, H, programs] it will write, if any.

    output is [B, N, H, D] contiguous, maps [B, H, T, N] contiguous float32 or None. config stands
    in for the table's, here and below.
    """
    prepared = _prepare_forward(InputLayouts.of(inputs), scale, device, config)
    partials = None
    if inputs.reference_key is not None:
        batch, heads = inputs.query.shape[:2]
        partials = output.new_empty((batch, heads, prepared.grid[1]), dtype=torch.float32)
    tensors = inputs._asdict() | {
        "output": output,
        "subject_loss": partials,
        "attn_probs": attn_probs,
    }
    return Launch(prepared, tensors), partials


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
    tiles = tiles_of(kernel, inputs, device)
    masked = kernel == "backward_key_value" and inputs.key_mask is not None
    pipeline = gradients.attn_probs is None and not reference_grad and not masked
    config = config or config_of(kernel, inputs, tiles, device, pipeline)
    key_tiles = 1
    if kernel == "backward_key_value":
        key_tiles = tile_keys(tiles, inputs.key.shape[2], config.key_tile)
    programs, blocks = split_rows(inputs, config, device, key_tiles)
    heads, _, head_dim = inputs.query.shape[1:]
    attn_probs = gradients.attn_probs
    all_heads = attn_probs is not None and len(attn_probs.shape) == 4
    output_steps = steps_of(gradients.output)
    numbers = common_numbers(inputs, tiles, scale) | {
        "output_stride_b": output_steps[0],
        "output_stride_h": output_steps[1],
        "output_stride_n": output_steps[2],
        "subject_loss_stride_b": batch_step(gradients.subject_loss),
        "probs_stride_b": 0 if attn_probs is None else attn_probs.strides[0],
        "probs_stride_h": attn_probs.strides[1] if attn_probs is not None and all_heads else 0,
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
        "grad_subject_loss": gradients.subject_loss,
        "grad_attn_probs": gradients.attn_probs,
    }


@kept
def _prepare_backward_query(
    kernel: str, inputs: InputLayouts, gradients: GradientLayouts, scale: float,
    reference_grad: bool, device: Device, config: KernelConfig | None,
) -> Prepared:  # fmt: skip
    reference_grad = reference_grad and gradients.subject_loss is not None
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


@kept
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
    config = sums_config(InputLayouts.of(inputs), device)
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


@kept
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
