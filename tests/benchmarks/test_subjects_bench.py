"""subjects_bench and the sheet of subjects, with the smallest settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import subjects_bench
import subjects_sheet
import torch
from common.flop_counter import flop_counter
from common.report import read_csv
from PIL import Image

import sefi_fast

TINY = ["--device", "cpu", "--resolution", "32", "--batch-size", "2", "--quick"]
TINY += ["--seconds", "0.01"]


def test_a_run_writes_its_rows_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--batch-subjects", "1", "2", "--steps", "50", "--output", str(tmp_path)]
    assert subjects_bench.main(arguments) == 0
    one, two = read_csv(tmp_path / "subjects_bench.csv")
    assert json.loads((tmp_path / "environment.json").read_text())["subjects_bench"]["settings"]
    assert (one["batch_subjects"], two["batch_subjects"], one["efficiency"]) == (1, 2, 1.0)
    assert two["flops_a_step"] == 2 * one["flops_a_step"] > 1e7
    assert two["peak_bytes"] > one["peak_bytes"] > 0
    hours = (50 * two["seconds_a_step"] / 2 + two["seconds_to_prepare"]) / 3600
    assert two["subjects_an_hour"] == pytest.approx(1 / hours)
    assert 0 < one["flops_share"] < 1.5
    assert (tmp_path / "subjects_bench.png").read_bytes().startswith(b"\x89PNG")
    assert "subjects/h" in capsys.readouterr().out


def test_subjects_that_do_not_fit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = subjects_bench.Run

    def narrow(source, config, jobs):  # type: ignore[no-untyped-def]
        if len(jobs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(source, config, jobs)

    monkeypatch.setattr(subjects_bench, "Run", narrow)
    options = [*TINY, "--batch-subjects", "1", "2", "4", "--output", str(tmp_path), "--no-plots"]
    report = subjects_bench.run(subjects_bench.parse(options))
    assert [row["batch_subjects"] for row in report["results"]] == [1]
    assert report["not_measured"] == ["2 subjects: CUDA out of memory"]


@pytest.mark.parametrize("reference", [True, False])
def test_flops_of_both_attentions_by_hand(reference: bool) -> None:
    query = torch.randn(2, 3, 10, 8, requires_grad=True)
    keys = [torch.randn(2, 3, 5, 8, requires_grad=not n) for n in range(3)]
    one = 2 * 2 * 3 * 10 * 5 * 8
    with flop_counter() as counter:
        result = sefi_fast.fused_cross_attention(
            query, *keys[:2], reference_key=keys[2] if reference else None
        )
        (result.output.sum() + result.subject_loss.sum()).backward()
    assert counter.get_total_flops() == (9 if reference else 7) * one
    with flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, *keys[:2]).sum().backward()
    assert counter.get_total_flops() == 7 * one


def test_a_sheet_of_two(tmp_path: Path) -> None:
    arguments = ["--subjects", "2", "--steps", "1", "--batch-size", "1", "--images", "1"]
    assert subjects_sheet.main([*arguments, "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "sheet.json").read_text())
    assert len(report["subjects"]) == 2 and 0 <= report["mean_marks_of_5"] <= 5
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 2 * 80
    assert (tmp_path / "subjects" / "summary.jsonl").exists()
