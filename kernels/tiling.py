"""What all plans share: tiles, configurations, how the rows are split, numbers, what is kept."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from .configs import KernelConfig, choose_config, choose_sums, smallest_tile, split_tile
from .launch import Device
from .layouts import InputLayouts, batch_step, steps_of

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
