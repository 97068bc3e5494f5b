"""attn_bench end to end on a tiny shape: its files, and what happens to a wrong contender."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import _contenders
import attn_bench
import pytest
import torch
from _bars import Bar, bars_of, cpu_bars
from _contenders import Contender, contenders, eager_maps
from _measure import Effort, Memory, Timing
from _record import Entry, ProblemRecord
from _reference import Inputs
from _roofline import Rates
from _run import SGEMM_SAME, STEPS_PER_CONTENDER, measure
from _shapes import Problem
from torch import Tensor

CPU = torch.device("cpu")
SHORT = Effort(seconds=0.01, block=0.001, rounds=3)
RATES = Rates("cpu", 1e10, 1e9, 1e11, "by hand", padded=False)
TINY = Problem("custom", queries=40, head_dim=16, heads=2)


def test_a_run_writes_valid_json_csv_and_png(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--shapes", "40x16x2", "--batches", "2", "--seconds", "0.01"]
    arguments += ["--only", "sefi-eager", "sdpa-flash", "--quick", "--output", str(tmp_path)]
    assert attn_bench.main(arguments) == 0
    report = json.loads((tmp_path / "attn_bench.json").read_text())
    with (tmp_path / "attn_bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["results"]) == 9
    for row in report["results"]:
        assert row["verdict"] == "right"
        assert row["seconds"] > 0
        assert row["gflops"] > 0
        assert row["roofline_share"] > 0
    both = {r["contender"]: r for r in report["results"] if r["direction"] == "both"}
    assert both["eager-maps"]["extra_bytes"] > 0
    assert both["sdpa-flash"]["products"] == 7
    assert str(Path.home()) not in json.dumps(report)
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == [
        "attn_bench_float32.png",
        "attn_bench_float32_roofline.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert not list(tmp_path.glob(".*")), "a temporary file was left"
    assert "eager-maps" in capsys.readouterr().out


def _wrong_gradient(inputs: Inputs) -> tuple[Tensor, Tensor]:
    output, alignment = eager_maps(inputs)
    return output, alignment.detach() + 0 * alignment


def test_a_wrong_contender_is_reported_wrong_and_gets_no_speed() -> None:
    ticks: list[None] = []
    field = [
        Contender("sefi-wrong", "sefi", True, _wrong_gradient),
        Contender("eager-maps", "eager", True, eager_maps),
    ]
    record = measure(TINY, field, CPU, torch.float32, RATES, SHORT, lambda: ticks.append(None))
    wrong, right = record.entry("sefi-wrong"), record.entry("eager-maps")
    assert wrong is not None and right is not None
    assert wrong.wrong is not None and "grad_query" in wrong.wrong
    assert not wrong.eager_times and wrong.memory is None and wrong.seconds("both") is None
    assert right.seconds("both") is not None
    row = record.row(wrong, "both")
    assert row["verdict"].startswith("wrong: grad_query")
    assert not {"seconds", "gflops", "roofline_share"} & row.keys()
    assert len(ticks) == STEPS_PER_CONTENDER * len(field)


def test_a_contender_that_raises_is_named_with_its_reason() -> None:
    def refuses(inputs: Inputs) -> tuple[Tensor, None]:
        raise RuntimeError("no such instruction\nlong trace")

    field = [
        Contender("eager-maps", "eager", True, eager_maps),
        Contender("other", "sdpa", False, refuses),
    ]
    record = measure(TINY, field, CPU, torch.float32, RATES, SHORT)
    entry = record.entry("other")
    assert entry is not None and entry.verdict == "not run: no such instruction"


def test_main_fails_when_a_sefi_backend_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_contenders, "_sefi", lambda backend: _wrong_gradient)
    arguments = ["--device", "cpu", "--shapes", "40x16x2", "--batches", "1", "--only", "sefi-eager"]
    arguments += ["--quick", "--seconds", "0.01", "--no-plots", "--output", str(tmp_path)]
    assert attn_bench.main(arguments) == 1
    rows = json.loads((tmp_path / "attn_bench.json").read_text())["results"]
    assert all("seconds" not in row for row in rows if row["contender"] == "sefi-eager")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "sd9"], "sd9"),
        (["--only", "nobody"], "nobody"),
        (["--device", "tpu"], "wanted"),
        (["--batches", "0"], "at least 1"),
    ],
)
def test_bad_arguments_give_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attn_bench.main(["--device", "cpu", "--quick", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_absent_contenders_have_a_reason() -> None:
    found, absent = contenders(CPU)
    names = {contender.name for contender in found}
    assert {"eager-maps", "eager-compiled", "sdpa", "sefi-eager", "flex"} <= names
    assert "CUDA" in absent["sefi-triton"] and "CUDA" in absent["sefi-cuda"]
    assert not names & absent.keys()


def _entry(name: str, family: str, seconds: float, extra: int) -> Entry:
    entry = Entry(name, family, family != "sdpa", errors={"output": 1e-7})
    entry.eager_times["both"] = Timing(seconds, seconds, 0.01, 9)
    entry.memory = Memory(extra, extra)
    return entry


def test_bars_of_the_cpu_are_told_as_met_or_not() -> None:
    record = ProblemRecord(Problem("sd15", 4096, 40, 8), "float32", 4, "cpu", RATES)
    record.entries = [
        _entry("sefi-cpu", "sefi", 1.0, 100),
        _entry("eager-maps", "eager", 1.5, 2000),
        _entry("sdpa", "sdpa", 1.05, 100),
        _entry("sdpa-flash", "sdpa", 1.02, 100),
    ]
    record.matrix_seconds = {SGEMM_SAME: 0.7}
    found = {bar.what: bar for bar in cpu_bars(record)}
    sgemm = found[f"share of sgemm, {SGEMM_SAME}"]
    assert sgemm == Bar("sd15 4096x40 b1", sgemm.what, 0.7, 0.65, True)
    assert found["times eager maps' speed"].met is False  # 1.5, wanted 1.6 at this layer
    assert found["times SDPA's speed without a loss"].measured == pytest.approx(1.02)
    assert found["times less extra memory than eager"].measured == pytest.approx(20.0)
    record.problem = Problem("sd15", 1024, 80, 8)
    assert {bar.what: bar.met for bar in cpu_bars(record)}["times eager maps' speed"] is True
    assert bars_of([record]) == cpu_bars(record)
    record.entries[2].eager_times["both"] = Timing(1.05, 1.0, 0.6, 9)
    assert record.noisy and bars_of([record]) == []
    wrong = record.entry("sefi-cpu")
    assert wrong is not None
    wrong.wrong = "output is off"
    assert cpu_bars(record) == []
