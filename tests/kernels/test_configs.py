"""Tiles cover what they must, and the table answers for every device, width and number of rows."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from sefi_fast.kernels.configs import TABLE, choose_config, split_tile

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
def test_every_device_width_and_length_has_a_configuration(kernel: str, precision: str) -> None:
    for capability in (80, 86, 89, 90, 100, 120):
        for width in (16, 48, 64, 80, 96, 160, 256):
            for keys in (16, 80, 128, 256):
                for rows in (1, 64, 256, 4096):
                    config = choose_config(kernel, capability, precision, width, keys, rows)
                    assert config.block in (16, 32, 64, 128)
                    assert config.warps in (4, 8)


def test_a_newer_device_takes_the_newest_row_that_is_not_newer() -> None:
    newest = max(capability for _, capability, _ in TABLE)
    for kernel in KERNELS:
        known = choose_config(kernel, newest, "half", 48, 80, 4096)
        assert choose_config(kernel, newest + 30, "half", 48, 80, 4096) == known
