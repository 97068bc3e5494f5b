"""Plans of launches: layouts, tiles, splits of the queries, and the arguments of each kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .attn_bwd_dkdv import _attn_bwd_dkdv
from .attn_bwd_dq import _attn_bwd_dq
from .attn_fwd import _attn_fwd
from .configs import (
    FUSED_GRADS,
    REDUCE_BLOCKS,
    KernelConfig,
    choose_config,
    choose_fused_config,
    smallest_tile,
    split_tile,
)
from .launch import ALIGNED_BYTES, CompiledLaunch, Device, Launch
from .primitives import ROW_STATS
from .reduce import _reduce_splits

if TYPE_CHECKING:
    from torch import Tensor

    from sefi_fast.ops.inputs import AttentionInputs, InputGrads, OutputGrads

MAX_ROW_STRIDE = 2**31 // 256 - 1
"""Largest step between rows, in elements: a tile has up to 256 rows and 32-bit offsets in it."""

SMALLEST_SCALE = 1e-30
"""Used for a scale of 0: hidden scores are -inf, and -inf times 0 would be NaN."""

LOG2_E = math.log2(math.e)

CTA_OVERHEAD_BLOCKS = 1.5
"""Time of a program without its blocks of queries, in such blocks: loads of the keys, instruction
cache misses, stores of partial sums. Fitted to times of few and of many programs on an H200."""

KEY_GRADIENTS = ("grad_key", "grad_value", "grad_reference_key")

KeyGrads = tuple["Tensor | None", "Tensor | None", "Tensor | None"]
"""Gradients of key, value and reference key."""

# One plan for each layout: all layers of a model at a few sizes are some dozens.
cached_plan = functools.lru_cache(maxsize=1024)


class Layout(NamedTuple):
    """The properties of a tensor that a plan depends on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def steps(self) -> tuple[int, int, int]:
        """Return the strides of batch, head and row in elements; 0 along an axis of one entry."""
        batch, head, row = (
            0 if size == 1 else stride
            for size, stride in zip(self.shape[:3], self.strides[:3], strict=True)
        )
        return batch, head, row


class Layouts(NamedTuple):
    """Layouts of the tensors that the kernels read, by the kernels' names; None where absent."""

    query: Layout
    key: Layout
    value: Layout | None
    reference_key: Layout | None
    token_weights: Layout | None
    key_mask: Layout | None
    probs_positions: Layout | None
    grad_output: Layout | None = None
    grad_subject_loss: Layout | None = None
    grad_attn_probs: Layout | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None]) -> Layouts:
        found: list[Any] = [
            None if x is None else Layout(x.shape, x.stride(), x.dtype) for x in tensors.values()
        ]
        return cls(*found)


def input_tensors(inputs: AttentionInputs, grads: OutputGrads | None = None) -> dict[str, Any]:
    """Return the tensors that the kernels read, by name, without those that no gradient needs."""
    tensors = inputs._asdict()
    if inputs.reference_key is None:
        tensors["token_weights"] = None
    if grads is None:
        return tensors
    if grads.output is None:
        tensors["value"] = None
    if grads.subject_loss is None:
        tensors["reference_key"] = tensors["token_weights"] = None
    if grads.attn_probs is None:
        tensors["probs_positions"] = None
    tensors["grad_output"] = grads.output
    tensors["grad_subject_loss"] = grads.subject_loss
    tensors["grad_attn_probs"] = grads.attn_probs
    return tensors


def steps_of(layout: Layout | None) -> tuple[int, int, int]:
    """Return the strides of batch, head and row; zeros for an absent tensor."""
    return (0, 0, 0) if layout is None else layout.steps()


def batch_step(layout: Layout | None) -> int:
    """Return the stride of the first axis; 0 if it has one entry or the tensor is absent."""
    return 0 if layout is None or layout.shape[0] == 1 else layout.strides[0]


def row_alignment(head_dim: int, *layouts: Layout | None) -> int:
    """Return the elements of 16 bytes if all rows start at multiples of them, else 1."""
    present = [layout for layout in layouts if layout is not None]
    elements = ALIGNED_BYTES // present[0].dtype.itemsize
    steps = [head_dim, *(step for layout in present for step in layout.steps())]
    return elements if all(step % elements == 0 for step in steps) else 1


def precision_of(layouts: Layouts) -> str:
    return "single" if layouts.query.dtype == torch.float32 else "half"


def tiles_of(kernel: str, layouts: Layouts, device: Device) -> dict[str, Any]:
    """Return the tiles of the head dimension and of the keys, by the kernels' names."""
    head_dim, seqlen_k = layouts.query.shape[3], layouts.key.shape[2]
    smallest = smallest_tile(kernel, precision_of(layouts), device.capability)
    block_d, block_d_tail = split_tile(head_dim, smallest)
    block_n, block_n_tail = split_tile(seqlen_k, 64)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_D_TAIL": block_d_tail,
        "BLOCK_N": block_n,
        "BLOCK_N_TAIL": block_n_tail,
        "EVEN_N": seqlen_k == block_n + block_n_tail,
    }


def _table_place(
    layouts: Layouts, tiles: dict[str, Any], device: Device
) -> tuple[int, str, int, int]:
    """Return the arguments of `choose_config` that follow the kernel."""
    return (
        device.capability,
        precision_of(layouts),
        tiles["BLOCK_D"] + tiles["BLOCK_D_TAIL"],
        tiles["BLOCK_N"] + tiles["BLOCK_N_TAIL"],
    )


@cached_plan
def fused_config(layouts: Layouts, device: Device) -> KernelConfig | None:
    """Return the configuration that sums dK, and dV, along with dQ; None where there is none."""
    return choose_fused_config(
        *_table_place(layouts, tiles_of("backward", layouts, device), device)
    )


class SplitPlan(NamedTuple):
    """The split of the queries of one head among programs."""

    num_splits: int
    blocks_per_cta: int


def choose_num_splits(
    layouts: Layouts, config: KernelConfig, device: Device, tiles_n: int = 1
) -> SplitPlan:
    """Return the split of the queries with the least expected time: waves × time of a program.

    One program more than fit on the device at once costs a whole wave.
    """
    batch, heads, seqlen_q, _ = layouts.query.shape
    blocks = -(-seqlen_q // config.block_m)
    ctas_per_wave = config.ctas_per_sm * device.multiprocessors
    best = (math.inf, 0, 0)
    blocks_per_cta = blocks
    while blocks_per_cta > 0:
        num_splits = -(-blocks // blocks_per_cta)
        blocks_per_cta = -(-blocks // num_splits)
        waves = -(-batch * heads * tiles_n * num_splits // ctas_per_wave)
        time = waves * (blocks_per_cta + CTA_OVERHEAD_BLOCKS)
        best = min(best, (time, num_splits, blocks_per_cta))
        blocks_per_cta -= 1
    return SplitPlan(*best[1:])


def _common_numbers(
    layouts: Layouts,
    tiles: dict[str, Any],
    scale: float,
    device: Device,
    config: KernelConfig,
    split: SplitPlan,
) -> dict[str, Any]:
    """Return the numbers that all kernels over queries take."""
    numbers = dict(tiles)
    for name in ("query", "key", "value", "reference_key"):
        short = "ref" if name == "reference_key" else name
        row = "n" if name == "query" else "m"
        names = [f"{short}_stride_{axis}" for axis in ("b", "h", row)]
        numbers.update(zip(names, steps_of(getattr(layouts, name)), strict=True))
    positions = layouts.probs_positions
    numbers.update(
        weight_stride_b=batch_step(layouts.token_weights),
        mask_stride_b=batch_step(layouts.key_mask),
        positions_stride_b=batch_step(positions),
        heads=layouts.query.shape[1],
        seqlen_q=layouts.query.shape[2],
        seqlen_k=layouts.key.shape[2],
        num_positions=0 if positions is None else positions.shape[1],
        sm_scale_log2=max(scale * LOG2_E, SMALLEST_SCALE),
        blocks_per_cta=split.blocks_per_cta,
        BLOCK_M=config.block_m,
        KV_IN_LOOP=config.kv_in_loop,
        ALIGNMENT=row_alignment(layouts.query.shape[3], *layouts[:4], layouts.grad_output),
        UPCAST=device.interpreted and layouts.query.dtype == torch.bfloat16,
    )
    return numbers


@cached_plan
def _compiled_forward(
    layouts: Layouts, scale: float, device: Device, config: KernelConfig | None
) -> CompiledLaunch:
    tiles = tiles_of("forward", layouts, device)
    config = config or choose_config(
        "forward", *_table_place(layouts, tiles, device), layouts.probs_positions is None
    )
    split = choose_num_splits(layouts, config, device)
    batch, heads = layouts.query.shape[:2]
    numbers = _common_numbers(layouts, tiles, scale, device, config, split)
    return CompiledLaunch(_attn_fwd, (batch * heads, split.num_splits), numbers, config)


def plan_forward(
    inputs: AttentionInputs, output: Tensor, attn_probs: Tensor | None, scale: float,
    device: Device, config: KernelConfig | None = None,
) -> tuple[Launch, Tensor | None]:  # fmt: skip
    """Return the forward launch and the partial subject losses [B, H, splits] it will write.

    output is memory of a contiguous [B, N, H, D], attn_probs of a [B, H, T, N] float32 or None.
    config replaces the table's, here and below.
    """
    tensors = input_tensors(inputs)
    compiled = _compiled_forward(Layouts.of(tensors), scale, device, config)
    partials = None
    if inputs.reference_key is not None:
        batch, heads = inputs.query.shape[:2]
        partials = output.new_empty((batch, heads, compiled.grid[1]), dtype=torch.float32)
    tensors.update(output=output, subject_loss=partials, attn_probs=attn_probs)
    return Launch(compiled, tensors), partials


class _Partial(NamedTuple):
    """Partial sums of one gradient: `num_splits` for each batch of total."""

    sums: Tensor
    total: Tensor
    num_splits: int


def _backward_numbers(
    kernel: str, layouts: Layouts, scale: float, reference_grad: bool, device: Device,
    config: KernelConfig | None,
) -> tuple[dict[str, Any], KernelConfig, int]:  # fmt: skip
    """Return the numbers shared by the backward kernels, their configuration and the splits."""
    tiles = tiles_of(kernel, layouts, device)
    of_keys = kernel == "backward_key_value"
    masked = of_keys and layouts.key_mask is not None
    pipeline = layouts.grad_attn_probs is None and not reference_grad and not masked
    config = config or choose_config(kernel, *_table_place(layouts, tiles, device), pipeline)
    seqlen_k = layouts.key.shape[2]
    tiles_n = -(-seqlen_k // config.block_n) if of_keys and config.block_n else 1
    if tiles_n > 1:
        even = seqlen_k == tiles_n * config.block_n
        tiles.update(BLOCK_N=config.block_n, BLOCK_N_TAIL=0, EVEN_N=even)
    split = choose_num_splits(layouts, config, device, tiles_n)
    probs = layouts.grad_attn_probs
    all_heads = probs is not None and len(probs.shape) == 4
    numbers = _common_numbers(layouts, tiles, scale, device, config, split)
    names = ("do_stride_b", "do_stride_h", "do_stride_n")
    numbers.update(zip(names, steps_of(layouts.grad_output), strict=True))
    numbers.update(
        loss_stride_b=batch_step(layouts.grad_subject_loss),
        probs_stride_b=0 if probs is None else probs.strides[0],
        probs_stride_h=probs.strides[1] if probs is not None and all_heads else 0,
        probs_factor=1.0 if all_heads else 1.0 / layouts.query.shape[1],
        scale=scale,
        PIPELINED=config.pipelined,
    )
    if of_keys:
        numbers["TILES_N"] = tiles_n
    return numbers, config, split.num_splits


@cached_plan
def _compiled_backward_query(
    kernel: str, layouts: Layouts, scale: float, reference_grad: bool, device: Device,
    config: KernelConfig | None,
) -> CompiledLaunch:  # fmt: skip
    reference_grad = reference_grad and layouts.grad_subject_loss is not None
    numbers, config, num_splits = _backward_numbers(
        kernel, layouts, scale, reference_grad, device, config
    )
    numbers.update(
        REFERENCE_GRAD=reference_grad,
        PREFETCH=config.prefetch,
        LOAD_DO_LATE=config.load_do_late or (config.kv_in_loop and not config.pipelined),
    )
    batch, heads = layouts.query.shape[:2]
    return CompiledLaunch(_attn_bwd_dq, (batch * heads, num_splits), numbers, config)


def empty_row_stats(query: Tensor) -> Tensor:
    """Return the float32 buffer [B, H, N, 8] that `_attn_bwd_dq` writes for `_attn_bwd_dkdv`."""
    return query.new_empty((*query.shape[:3], ROW_STATS.value), dtype=torch.float32)


def plan_backward_query(
    inputs: AttentionInputs, grads: OutputGrads, grad_query: Tensor | None,
    row_stats: Tensor | None, scale: float, reference_grad: bool, device: Device,
    config: KernelConfig | None = None,
) -> Launch:  # fmt: skip
    """Return the launch that writes grad_query, a contiguous [B, N, H, D], and row_stats.

    row_stats is memory from `empty_row_stats`, which `plan_backward_key_value` needs.
    """
    tensors = input_tensors(inputs, grads)
    compiled = _compiled_backward_query(
        "backward_query", Layouts.of(tensors), scale, reference_grad, device, config
    )
    tensors.update(grad_query=grad_query, row_stats=row_stats)
    return Launch(compiled, tensors)


def plan_backward_fused(
    inputs: AttentionInputs, grads: OutputGrads, grad_query: Tensor | None,
    row_stats: Tensor | None, totals: tuple[Tensor | None, Tensor | None], scale: float,
    reference_grad: bool, device: Device, config: KernelConfig,
) -> list[Launch]:  # fmt: skip
    """Return the launches of `plan_backward_query` that write dK, and dV, as well.

    totals are as for `plan_backward_key_value`; config.fuse_dkv says which of them are summed.
    """
    launch, partials = _backward_fused(
        inputs, grads, grad_query, row_stats, totals, scale, reference_grad, device, config
    )
    return [launch, *_plan_reductions(partials, device)]


def _backward_fused(
    inputs: AttentionInputs, grads: OutputGrads, grad_query: Tensor | None,
    row_stats: Tensor | None, totals: tuple[Tensor | None, Tensor | None], scale: float,
    reference_grad: bool, device: Device, config: KernelConfig,
) -> tuple[Launch, list[_Partial]]:  # fmt: skip
    tensors = input_tensors(inputs, grads)
    compiled = _compiled_backward_query(
        "backward", Layouts.of(tensors), scale, reference_grad, device, config
    )
    written, partials = _partials(inputs, totals, compiled.grid[1])
    tensors.update(
        grad_query=grad_query, grad_key=written[0], grad_value=written[1], row_stats=row_stats
    )
    return Launch(compiled, tensors), partials


@cached_plan
def _compiled_backward_key_value(
    layouts: Layouts, scale: float, reference_grad: bool, device: Device,
    config: KernelConfig | None,
) -> CompiledLaunch:  # fmt: skip
    numbers, config, num_splits = _backward_numbers(
        "backward_key_value", layouts, scale, reference_grad, device, config
    )
    batch, heads = layouts.query.shape[:2]
    grid = (batch * heads * numbers["TILES_N"], num_splits)
    return CompiledLaunch(_attn_bwd_dkdv, grid, numbers, config)


def plan_backward_key_value(
    inputs: AttentionInputs, grads: OutputGrads, row_stats: Tensor, totals: KeyGrads, scale: float,
    device: Device, config: KernelConfig | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launches that write the gradients of key, value and reference key.

    totals are contiguous [B or 1, M, H, D], or None where not wanted; at least one is wanted. A
    batch of 1 under a larger batch of queries gets the sum over it. With one split a gradient, the
    first kernel writes the totals itself.
    """
    launches, partials = _backward_key_value(
        inputs, grads, row_stats, totals, scale, device, config
    )
    return launches + _plan_reductions(partials, device)


def _backward_key_value(
    inputs: AttentionInputs, grads: OutputGrads, row_stats: Tensor, totals: KeyGrads, scale: float,
    device: Device, config: KernelConfig | None,
) -> tuple[list[Launch], list[_Partial]]:  # fmt: skip
    tensors = input_tensors(inputs, grads)
    compiled = _compiled_backward_key_value(
        Layouts.of(tensors), scale, totals[2] is not None, device, config
    )
    tensors["row_stats"] = row_stats
    written, partials = _partials(inputs, totals, compiled.grid[1])
    parts = [dict(zip(KEY_GRADIENTS, written, strict=True))]
    if compiled.config.split_dk_dv:
        parts = [{name: each} for name, each in parts[0].items() if each is not None]
    return [Launch(compiled, tensors | part) for part in parts], partials


def plan_backward(
    inputs: AttentionInputs, grads: OutputGrads, totals: InputGrads, scale: float,
    reference_grad: bool, device: Device,
) -> list[Launch]:  # fmt: skip
    """Return the launches that write the gradients of query, key, value and reference key.

    totals are as for `plan_backward_query` and `plan_backward_key_value`; at least one is wanted.
    """
    grad_query, *of_keys = totals
    config = fused_config(Layouts.of(input_tensors(inputs)), device)
    # Without dK the sums would leave the greater part to the kernel of the keys.
    fused = FUSED_GRADS[config.fuse_dkv] if config is not None and totals[1] is not None else 0
    summed = (totals[1] if fused > 0 else None, totals[2] if fused > 1 else None)
    of_keys[:fused] = [None] * fused
    row_stats = None
    if any(total is not None for total in of_keys):
        row_stats = empty_row_stats(inputs.query)
    partials: list[_Partial] = []
    if config is not None and fused:
        launch, partials = _backward_fused(
            inputs, grads, grad_query, row_stats, summed, scale, reference_grad, device, config
        )
    else:
        launch = plan_backward_query(
            inputs, grads, grad_query, row_stats, scale, reference_grad, device
        )
    launches = [launch]
    if row_stats is not None:
        wanted = (of_keys[0], of_keys[1], of_keys[2])
        more, others = _backward_key_value(inputs, grads, row_stats, wanted, scale, device, None)
        launches += more
        partials += others
    return launches + _plan_reductions(partials, device)


def _partials(
    inputs: AttentionInputs, totals: Sequence[Tensor | None], num_splits: int
) -> tuple[list[Tensor | None], list[_Partial]]:
    """Return the memory that the programs write for each total, and the sums to reduce.

    The programs write the total itself if each of its batches has one sum.
    """
    batch, heads, _, head_dim = inputs.query.shape
    shape = (batch, num_splits, inputs.key.shape[2], heads, head_dim)
    written: list[Tensor | None] = []
    partials = []
    for total in totals:
        if total is None or (num_splits == 1 and total.shape[0] == batch):
            written.append(total)
            continue
        sums = total.new_empty(shape, dtype=torch.float32)
        written.append(sums)
        partials.append(_Partial(sums, total, batch * num_splits // total.shape[0]))
    return written, partials


def _plan_reductions(partials: Sequence[_Partial], device: Device) -> list[Launch]:
    """Return the launches that reduce partial sums into totals, equal shapes in one launch."""
    kinds: dict[tuple[int, int], list[_Partial]] = {}
    for partial in partials:
        kinds.setdefault((partial.total.shape[0], partial.num_splits), []).append(partial)
    return [_plan_reduction(kind, device) for _, kind in sorted(kinds.items())]


def _plan_reduction(partials: Sequence[_Partial], device: Device) -> Launch:
    """Return the launch that reduces up to three gradients of equal shape."""
    _, total, num_splits = partials[0]
    groups = total.shape[0]
    compiled = _compiled_reduction(
        total.numel() // groups, groups, len(partials), total.dtype, num_splits, device
    )
    tensors: dict[str, Tensor | None] = {}
    for place, partial in zip(("first", "second", "third"), partials, strict=False):
        tensors[f"{place}_partials"] = partial.sums
        tensors[f"{place}_total"] = partial.total
    return Launch(compiled, tensors)


@cached_plan
def _compiled_reduction(
    numel: int, groups: int, gradients: int, dtype: torch.dtype, num_splits: int, device: Device
) -> CompiledLaunch:
    """Return the kernel for totals of `dtype`, which is part of the cache's key alone."""
    ahead = next(size for size in (2, 4, 8, 16) if size >= min(num_splits, 16))
    # Small programs where larger ones would leave multiprocessors idle.
    enough = numel * groups * gradients >= REDUCE_BLOCKS[4] * 2 * device.multiprocessors
    warps = 4 if enough else 1
    block = REDUCE_BLOCKS[warps]
    numbers = {"numel": numel, "num_splits": num_splits, "BLOCK": block, "AHEAD": ahead}
    grid = (-(-numel // block), groups, gradients)
    return CompiledLaunch(_reduce_splits, grid, numbers, KernelConfig(block, warps, 1))
