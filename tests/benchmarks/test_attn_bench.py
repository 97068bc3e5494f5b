"""attn_bench end to end on a tiny shape: its files, its targets, and providers that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attn_bench
import pytest
import torch
from common.attn_run import STEPS_PER_PROVIDER, is_noisy, measure, problem_table, targets
from common.providers import EAGER, Provider, eager_maps
from common.reference import Inputs
from common.report import Row, read_csv, targets_table
from common.roofline import Rates
from common.shapes import Problem
from common.timing import Effort
from torch import Tensor

CPU = torch.device("cpu")
SHORT = Effort(seconds=0.01, block=0.001, rounds=3)
RATES = Rates("cpu", 1e10, 1e9, 1e11, "by hand", padded=False)
TINY = Problem("custom", queries=40, head_dim=16, heads=2)
ARGUMENTS = ["--device", "cpu", "--shapes", "40x16x2", "--quick", "--seconds", "0.01"]


def test_a_run_writes_its_rows_environment_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*ARGUMENTS, "--batches", "2", "--only", "sefi-eager", "sdpa-flash"]
    assert attn_bench.main([*arguments, "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "attn_bench.csv")
    assert len(rows) == 9
    for row in rows:
        assert row["status"] == "pass"
        assert row["seconds"] > 0 and row["gflops"] > 0 and row["roofline_share"] > 0
    both = {row["provider"]: row for row in rows if row["direction"] == "both"}
    assert both["eager-maps"]["extra_bytes"] > 0 and both["eager-maps"]["sgemm_share_same"] > 0
    assert both["sdpa-flash"]["products"] == 7
    environment = (tmp_path / "environment.json").read_text()
    report = json.loads(environment)["attn_bench"]
    assert report["settings"]["dtypes"] == ["float32"] and report["rates"]["float32"]["flops"] > 0
    assert "results" not in report and str(Path.home()) not in environment
    plots = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in plots] == ["attn_bench_float32.png", "attn_bench_float32_roofline.png"]
    assert not list(tmp_path.glob(".*")), "a temporary file was left"
    assert "eager-maps" in capsys.readouterr().out
    for plot in plots:
        plot.unlink()
    assert attn_bench.main(["--plot-only", str(tmp_path)]) == 0
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)


def _wrong_gradient(inputs: Inputs) -> tuple[Tensor, Tensor]:
    output, subject_loss = eager_maps(inputs)
    return output, subject_loss.detach() + 0 * subject_loss


def _refuse(inputs: Inputs) -> tuple[Tensor, None]:
    raise RuntimeError("no such instruction\nlong trace")


def test_a_provider_that_fails_gets_a_reason_and_no_figures() -> None:
    ticks: list[None] = []
    chosen = [
        Provider("sefi-wrong", "sefi", True, _wrong_gradient),
        Provider("other", "sdpa", False, _refuse),
        EAGER,
    ]
    rows = measure(TINY, chosen, CPU, torch.float32, RATES, SHORT, lambda: ticks.append(None))
    status = {row["provider"]: row["status"] for row in rows}
    assert status["sefi-wrong"].startswith("fail: grad_query is off")
    assert status["other"] == "not run: no such instruction"
    for row in rows:
        measured = {"seconds", "gflops", "roofline_share"} & row.keys()
        assert bool(measured) == (row["provider"] == "eager-maps")
    assert len(ticks) == STEPS_PER_PROVIDER * len(chosen)
    assert "not run: no such instruction" in problem_table(rows)


def _row(provider: str, seconds: float, extra: int, **more: Any) -> Row:
    row = {"model": "sd15", "queries": 4096, "head_dim": 40, "heads": 8, "batch": 1, "keys": 77}
    row |= {"dtype": "float32", "provider": provider, "direction": "both", "seconds": seconds}
    return row | {"spread": 0.01, "extra_bytes": extra, "roofline_share": 0.5} | more


def test_ratios_on_a_cpu_by_hand() -> None:
    rows = [
        _row("sefi-cpu", 1.0, 100, sgemm_share_same=0.7),
        _row("eager-maps", 1.5, 2000),
        _row("sdpa", 1.05, 100),
        _row("sdpa-flash", 1.02, 100),
    ]
    found = targets(rows, "cpu")
    assert found == [
        ("sd15 4096x40 b1", "share of sgemm, same shapes", 0.7, 0.65),
        ("sd15 4096x40 b1", "times SDPA's speed without a loss", 1.02, 1.0),
        ("sd15 4096x40 b1", "times eager maps' speed", 1.5, 1.6),
        ("sd15 4096x40 b1", "times less extra memory than eager", 20.0, 10.0),
    ]
    assert targets_table(found).splitlines()[-1].split()[-2:] == ["20.00", "10.00"]
    noisy = [*rows[:2], rows[2] | {"spread": 0.6}]
    assert is_noisy(noisy) and targets(noisy, "cpu") == []
    assert targets(rows[1:], "cpu") == []
