"""Tiles cover what they must, and the table answers for every device and width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from sefi_fast.kernels import Device
from sefi_fast.kernels.configs import TABLE, KernelConfig, choose_config, choose_sums, split_tile
from sefi_fast.kernels.plan import START, InputLayouts, Layout, split_rows

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
                assert config.block in (16, 32, 64, 128)
                assert config.warps in (4, 8)


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


def test_sums_of_the_keys_go_along_with_dq_where_the_registers_hold_them() -> None:
    assert [choose_sums(90, "half", width, 80).sums for width in (16, 64, 80)] == [2, 2, 1]
    assert choose_sums(90, "half", 96, 80) is None
    assert choose_sums(90, "half", 64, 96) is None
    for capability, precision in ((90, "single"), (80, "half"), (89, "half"), (100, "half")):
        assert choose_sums(capability, precision, 64, 80) is None


@pytest.mark.parametrize("key_width", [144, 160, 192, 256])
def test_many_keys_keep_a_warp_group_s_rows_and_fit_shared_memory(key_width: int) -> None:
    for kernel in ("forward", "backward_query"):
        for width in (48, 64, 80, 160):
            config = choose_config(kernel, 90, "half", width, key_width)
            assert config.block >= 64
            # Without reload three sets of keys are held, two bytes an element.
            assert config.reload or 3 * 2 * key_width * width < 227 * 1024
            assert choose_config(kernel, 80, "half", width, key_width).block <= 32
    assert choose_config("backward_key_value", 90, "half", 64, key_width).key_tile == 64
    single = choose_config("backward_key_value", 90, "single", 80, 96)
    assert single.key_tile == 32


def split(heads: int, rows: int, config: KernelConfig) -> tuple[int, int]:
    query = Layout((1, heads, rows, 40), (1, 1, 1, 1), torch.bfloat16)
    inputs = InputLayouts(query, query, query, None, None, None, None)
    return split_rows(inputs, config, Device(90, 132, False))


@pytest.mark.parametrize(
    ("heads", "rows", "resident", "programs"),
    [
        # 4 programs a head would be 512 on 396 places: two turns for a third more than one.
        (128, 4096, 3, (3, 22)),
        (128, 4096, 2, (2, 32)),
        (128, 1024, 3, (3, 6)),
        # Everything fits at once: as many as there are blocks.
        (8, 1024, 3, (16, 1)),
        # Two turns of few rows are longer than one of more: what a program begins with counts.
        (8, 4096, 3, (32, 2)),
        (1, 1, 3, (1, 1)),
    ],
)
def test_programs_fill_whole_turns(
    heads: int, rows: int, resident: int, programs: tuple[int, int]
) -> None:
    assert split(heads, rows, KernelConfig(64, 4, 1, resident=resident)) == programs


@given(
    st.integers(1, 3000), st.integers(1, 20_000), st.integers(1, 4),
    st.sampled_from([16, 32, 64, 128]),
)  # fmt: skip
def test_every_row_has_a_program_and_no_other_split_is_expected_to_end_before(
    heads: int, rows: int, resident: int, block: int
) -> None:
    programs, each = split(heads, rows, KernelConfig(block, 4, 1, resident=resident))
    blocks = -(-rows // block)
    assert (programs - 1) * each < blocks <= programs * each

    def cost(programs: int) -> float:
        turns = -(-heads * programs // (132 * resident))
        return turns * (-(-blocks // programs) + START)

    assert cost(programs) == min(map(cost, range(1, blocks + 1)))
