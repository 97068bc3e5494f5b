"""Tiles cover what they must, and the table answers for every device and width."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sefi_fast.kernels.configs import (
    TABLE,
    choose_config,
    choose_fused_config,
    not_supported_reason,
    split_tile,
)

KERNELS = ("forward", "backward_query", "backward_key_value")


@pytest.mark.parametrize(
    ("size", "smallest", "tiles"),
    [
        (77, 64, (64, 16)),
        (64, 64, (64, 0)),
        (65, 64, (64, 16)),
        (33, 64, (64, 0)),
        (1, 64, (16, 0)),
        (100, 64, (128, 0)),
        (160, 64, (128, 32)),
        (200, 64, (256, 0)),
        (256, 64, (256, 0)),
        (40, 32, (32, 16)),
        (80, 32, (64, 16)),
        (160, 32, (128, 32)),
        (8, 32, (16, 0)),
        (40, 64, (64, 0)),
    ],
)
def test_tiles_of_known_sizes(size: int, smallest: int, tiles: tuple[int, int]) -> None:
    assert split_tile(size, smallest) == tiles


@pytest.mark.parametrize("smallest", [32, 64])
def test_tiles_cover_every_size_and_never_more_than_a_power_of_two(smallest: int) -> None:
    for size in range(1, 257):
        main, tail = split_tile(size, smallest)
        whole = max(16, 1 << (size - 1).bit_length())
        assert size <= main + tail <= whole
        assert main.bit_count() == 1 and (tail == 0 or (tail.bit_count() == 1 and tail >= 16))
        # The kernels leave the main tile unmasked where there is a tail.
        assert tail == 0 or main <= size


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", ["half", "single"])
def test_every_device_and_width_has_a_configuration(kernel: str, precision: str) -> None:
    for capability in (80, 86, 89, 90, 100, 120):
        for width in (16, 48, 64, 80, 96, 160, 256):
            for keys in (16, 80, 128, 256):
                config = choose_config(kernel, capability, precision, width, keys)
                assert config.block_m in (16, 32, 64, 128)
                assert config.num_warps in (4, 8)


def test_a_newer_device_takes_the_newest_row_that_is_not_newer() -> None:
    newest = max(capability for _, capability, _ in TABLE)
    for kernel in KERNELS:
        known = choose_config(kernel, newest, "half", 48, 80)
        assert choose_config(kernel, newest + 30, "half", 48, 80) == known


def test_consumer_blackwell_has_the_lines_of_the_older_matrix_unit() -> None:
    for kernel in KERNELS:
        for width in (64, 80, 160):
            known = choose_config(kernel, 89, "half", width, 80)
            assert choose_config(kernel, 120, "half", width, 80) == known


def test_dk_and_dv_are_fused_with_dq_where_the_registers_hold_them() -> None:
    found = [choose_fused_config(90, "half", width, 80) for width in (16, 64, 80)]
    assert [config and config.fuse_dkv for config in found] == ["dkdv", "dkdv", "dk"]
    assert choose_fused_config(90, "half", 96, 80) is None
    assert choose_fused_config(90, "half", 64, 96) is None
    for capability, precision in ((90, "single"), (80, "half"), (89, "half"), (100, "half")):
        assert choose_fused_config(capability, precision, 64, 80) is None


@pytest.mark.parametrize("key_width", [144, 160, 192, 256])
def test_many_keys_keep_a_warp_group_s_rows_and_fit_shared_memory(key_width: int) -> None:
    for kernel in ("forward", "backward_query"):
        for width in (48, 64, 80, 160):
            config = choose_config(kernel, 90, "half", width, key_width)
            assert config.block_m >= 64
            # Without kv_in_loop three sets of keys are held, two bytes an element.
            assert config.kv_in_loop or 3 * 2 * key_width * width < 227 * 1024
            assert choose_config(kernel, 80, "half", width, key_width).block_m <= 32
    assert choose_config("backward_key_value", 90, "half", 64, key_width).block_n == 64
    single = choose_config("backward_key_value", 90, "single", 80, 96)
    assert single.block_n == 32


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "keys", "refused"),
    [
        (86, torch.float32, 160, 77, False),
        (86, torch.float32, 160, 154, True),
        (80, torch.float32, 160, 154, True),
        (80, torch.float32, 80, 154, False),
        (80, torch.float32, 128, 160, True),
        (89, torch.float32, 128, 128, True),
        (89, torch.float32, 40, 256, True),
        (80, torch.float32, 256, 77, True),
        (90, torch.float32, 256, 77, False),
        (90, torch.float32, 80, 256, False),
        (89, torch.bfloat16, 256, 256, True),
        (120, torch.float16, 192, 193, True),
        (120, torch.bfloat16, 256, 128, False),
        (80, torch.bfloat16, 256, 256, False),
        (90, torch.bfloat16, 256, 192, True),
        (90, torch.bfloat16, 160, 256, False),
    ],
)
def test_calls_that_no_program_can_hold_are_refused(
    capability: int, dtype: torch.dtype, head_dim: int, keys: int, refused: bool
) -> None:
    reason = not_supported_reason(dtype, head_dim, keys, capability)
    assert (reason is not None) == refused
    if reason is not None:
        assert f"{keys} keys and a head dimension of {head_dim}" in reason
        assert ("bfloat16 fits" in reason) == (dtype == torch.float32)
