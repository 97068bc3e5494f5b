"""Roofline arithmetic and occupancy by hand, and the shapes."""

from __future__ import annotations

import pytest
import roofline_tables
from common.occupancy import occupancy
from common.roofline import DATASHEET, Rates, bound, direction_bound, kernel_work, products, work
from common.shapes import Problem, problems

ROW = Problem("custom", queries=1, head_dim=40, heads=1)


def test_one_row_of_width_40_forward() -> None:
    counted = work(ROW, 2, "forward")
    assert counted.row_bytes == 160  # q and o, 40 bf16 each
    assert counted.exponentials == 160  # two softmaxes over 80 columns
    assert counted.flops == 18_480  # three products of 2 · 77 · 40
    assert counted.tile_flops == 23_040  # three products of 2 · 80 · 48
    assert counted.key_bytes == 3 * 77 * 40 * 2  # k, v and the reference key


def test_one_row_of_width_40_backward() -> None:
    counted = work(ROW, 2, "backward")
    assert counted.row_bytes == 240  # q, do and dq
    assert counted.exponentials == 160
    assert counted.flops == 36_960  # six products
    assert counted.key_bytes == (4 + 1) * 77 * 40 * 2  # k, v, dk, dv and the reference key


def test_the_two_backward_kernels_read_twice_and_make_nine_products() -> None:
    query, key_value = (kernel_work(ROW, 2, f"backward_{name}") for name in ("query", "key_value"))
    # A sector of eight float32 numbers a row goes from one to the other.
    assert (query.row_bytes, key_value.row_bytes) == (240 + 32, 160 + 32)
    assert query.exponentials + key_value.exponentials == 320
    assert query.tile_flops + key_value.tile_flops == 9 * 2 * 80 * 48
    assert kernel_work(ROW, 2, "forward").row_bytes == work(ROW, 2, "forward").row_bytes
    apart = [kernel_work(ROW, 2, f"backward_key_value ({g})") for g in ("grad_key", "grad_value")]
    assert [part.tile_flops for part in apart] == [4 * 2 * 80 * 48, 2 * 2 * 80 * 48]
    assert [part.exponentials for part in apart] == [160, 80]


def test_in_one_kernel_the_backward_does_no_more_than_it_must() -> None:
    one, least = kernel_work(ROW, 2, "backward"), work(ROW, 2, "backward")
    assert one == least._replace(key_bytes=0.0)


def test_without_the_loss_one_softmax_and_one_product_less_a_direction() -> None:
    assert [products(d, with_loss=False) for d in ("forward", "backward")] == [2, 5]
    counted = work(ROW, 4, "forward", with_loss=False)
    assert counted.exponentials == 80
    assert counted.row_bytes == 320
    assert counted.key_bytes == 2 * 77 * 40 * 4


def test_both_is_the_sum_and_makes_nine_products() -> None:
    assert products("both") == 9
    forward, backward = work(ROW, 2, "forward"), work(ROW, 2, "backward")
    for both, one, other in zip(work(ROW, 2, "both"), forward, backward, strict=True):
        assert both == one + other


def test_rows_multiply_and_the_reference_key_is_shared_by_the_batch() -> None:
    problem = Problem("custom", queries=64, head_dim=160, heads=8, batch=4)
    counted = work(problem, 2, "forward")
    assert problem.rows == 2048
    assert counted.row_bytes == 2048 * 640
    assert counted.key_bytes == (2 * 4 + 1) * 8 * 77 * 160 * 2


def test_the_slowest_unit_sets_the_bound() -> None:
    counted = work(ROW, 2, "forward")
    slow_bytes = Rates("device", 1.0, 1e9, 1e9, "by hand")
    assert bound(counted, slow_bytes) == (160.0, "bytes", bound(counted, slow_bytes).parts)
    slow_matrix = Rates("device", 1e9, 1e9, 10.0, "by hand")
    assert bound(counted, slow_matrix).seconds == 2304.0
    unpadded = Rates("device", 1e9, 1e9, 10.0, "by hand", padded=False)
    assert bound(counted, unpadded).seconds == 1848.0
    both = direction_bound(ROW, 2, slow_bytes, "both")
    assert both.seconds == 160.0 + 240.0
    assert both.unit == "bytes"


def test_width_40_on_an_h200_is_bound_by_exponentials_and_width_160_by_bytes() -> None:
    narrow = bound(work(ROW, 2, "forward"), DATASHEET["H200"])
    assert narrow.unit == "exponentials"
    assert narrow.seconds == pytest.approx(38e-12, rel=0.02)
    wide = Problem("custom", queries=1, head_dim=160, heads=1)
    assert bound(work(wide, 2, "forward"), DATASHEET["H200"]).unit == "bytes"


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


@pytest.mark.parametrize("word", ["sd9", "sd15:77", "4096x40", "0x40x8", "64x300x8"])
def test_an_unknown_shape_says_what_is_wanted(word: str) -> None:
    with pytest.raises(ValueError, match=word):
        problems([word], [1])


def test_keys_and_batches_are_checked() -> None:
    with pytest.raises(ValueError, match="257"):
        problems(["sd15"], [1], keys=257)
    with pytest.raises(ValueError, match="at least 1"):
        problems(["sd15"], [0])


def test_occupancy_by_hand() -> None:
    # 168 registers · 128 threads = 21,504 a block: three of 65,536; 4 warps each.
    assert occupancy(90, 168, 4, 24_064)[:2] == (3, 12)
    assert occupancy(90, 168, 4, 24_064).limit == "registers"
    # 100 KiB of shared memory and 1 KiB reserved a block: two of 228 KiB.
    assert occupancy(90, 32, 4, 100 * 1024)[:2] == (2, 8)
    with pytest.raises(ValueError, match="75"):
        occupancy(75, 32, 4, 0)
