"""Roofline arithmetic and occupancy by hand, and the shapes."""

from __future__ import annotations

import pytest
import roofline_tables
from common.occupancy import occupancy
from common.roofline import (
    DATASHEET,
    Direction,
    Rates,
    bound,
    direction_bound,
    products,
    work,
)
from common.shapes import Problem, problems

ROW = Problem("custom", queries=1, head_dim=40, heads=1)


@pytest.mark.parametrize(
    ("direction", "with_loss", "row_tensors", "softmaxes", "count", "key_tensors"),
    [
        ("forward", True, 2, 2, 3, 3),  # q, o; k, v and the reference key
        ("backward", True, 3, 2, 6, 5),  # q, do, dq; dk and dv as well
        ("forward", False, 2, 1, 2, 2),
        ("backward", False, 3, 1, 5, 4),
        ("both", True, 5, 4, 9, 8),
    ],
)
def test_work_of_one_row(
    direction: Direction,
    with_loss: bool,
    row_tensors: int,
    softmaxes: int,
    count: int,
    key_tensors: int,
) -> None:
    """77 keys and 40 columns: tiles have 80 keys and 48 columns."""
    found = work(ROW, 2, direction, with_loss)
    assert found.row_bytes == row_tensors * 40 * 2
    assert found.exponentials == softmaxes * 80
    assert found.flops == count * 2 * 77 * 40
    assert found.tile_flops == count * 2 * 80 * 48
    assert found.key_bytes == key_tensors * 77 * 40 * 2
    assert products(direction, with_loss) == count


@pytest.mark.parametrize(
    ("rates", "seconds", "unit"),
    [
        (Rates("device", 1.0, 1e9, 1e9, "by hand"), 160.0, "bytes"),
        (Rates("device", 1e9, 1e9, 10.0, "by hand"), 2304.0, "matrix"),
        (Rates("device", 1e9, 1e9, 10.0, "by hand", padded=False), 1848.0, "matrix"),
        # Narrow heads on an H200 are bound by exponentials.
        (DATASHEET["H200"], 160 / (16 * 132 * 1.98e9), "exponentials"),
    ],
)
def test_the_slowest_unit_sets_the_bound(rates: Rates, seconds: float, unit: str) -> None:
    found = bound(work(ROW, 2, "forward"), rates)
    assert (found.seconds, found.unit) == (pytest.approx(seconds), unit)
    both = direction_bound(ROW, 2, rates, "both").seconds
    assert both == found.seconds + direction_bound(ROW, 2, rates, "backward").seconds


def test_the_printed_tables_hold_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline_tables.main() == 0
    printed = capsys.readouterr().out
    assert "| 40 | 160 | 240 | 160 | 160 | 23.0 | 46.1 |" in printed
    # 16 · 8 · 4096 rows of 160 exponentials at 4.18e12 a second.
    assert "| sd15 4096x40, 8 heads | 41.1 / 77.4 | 25.0 / 37.6 | 20.1 / 26.2 |" in printed


def test_shapes_by_model_layer_and_size() -> None:
    assert [p.head_dim for p in problems(["sd15"], [1])] == [40, 80, 160, 160]
    (layer,) = problems(["sdxl:1024"], [16])
    assert (layer.heads, layer.head_dim, layer.batch, layer.keys) == (20, 64, 16, 77)
    assert problems(["12x8x3", "12x8x3"], [2]) == [Problem("custom", 12, 8, 3, 2)]


@pytest.mark.parametrize(
    ("shape", "batch", "keys", "message"),
    [(word, 1, 77, word) for word in ("sd9", "sd15:77", "4096x40", "0x40x8", "64x300x8")]
    + [("sd15", 1, 257, "257"), ("sd15", 0, 77, "at least 1")],
)
def test_a_wrong_shape_is_named(shape: str, batch: int, keys: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problems([shape], [batch], keys)


@pytest.mark.parametrize(
    ("registers", "shared", "found"),
    [
        # 168 registers · 128 threads = 21,504 a block: three of 65,536, 4 warps each.
        (168, 24_064, (3, 12, "registers")),
        # 100 KiB of shared memory and 1 KiB reserved a block: two of 228 KiB.
        (32, 100 * 1024, (2, 8, "shared memory")),
    ],
)
def test_occupancy_by_hand(registers: int, shared: int, found: tuple[int, int, str]) -> None:
    assert occupancy(90, registers, 4, shared) == found
