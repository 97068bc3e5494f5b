"""attn_bench end to end on a tiny shape: its files, and what happens to a wrong contender."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import _contenders
import attn_bench
import pytest
import torch
from _contenders import Contender, contenders, eager_maps
from _measure import Effort, Memory, Timing
from _record import Entry, ProblemRecord
from _reference import Inputs
from _report import targets_table
from _roofline import Rates
from _run import SGEMM_SAME, STEPS_PER_CONTENDER, measure
from _shapes import Problem
from torch import Tensor

CPU = torch.device("cpu")
SHORT = Effort(seconds=0.01, block=0.001, rounds=3)
RATES = Rates("cpu", 1e10, 1e9, 1e11, "by hand", padded=False)
TINY = Problem("custom", queries=40, head_dim=16, heads=2)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "attn_bench.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_its_rows_environment_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--shapes", "40x16x2", "--batches", "2", "--seconds", "0.01"]
    arguments += ["--only", "sefi-eager", "sdpa-flash", "--quick", "--output", str(tmp_path)]
    assert attn_bench.main(arguments) == 0
    rows = read_rows(tmp_path)
    assert len(rows) == 9
    for row in rows:
        assert row["verdict"] == "right"
        assert float(row["seconds"]) > 0
        assert float(row["gflops"]) > 0
        assert float(row["roofline_share"]) > 0
    both = {r["contender"]: r for r in rows if r["direction"] == "both"}
    assert int(both["eager-maps"]["extra_bytes"]) > 0
    assert both["sdpa-flash"]["products"] == "7"
    environment = (tmp_path / "environment.json").read_text()
    report = json.loads(environment)["attn_bench"]
    assert report["settings"]["dtypes"] == ["float32"] and report["rates"]["float32"]["flops"] > 0
    assert "results" not in report and str(Path.home()) not in environment
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == [
        "attn_bench_float32.png",
        "attn_bench_float32_roofline.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert not list(tmp_path.glob(".*")), "a temporary file was left"
    assert "eager-maps" in capsys.readouterr().out


def _wrong_gradient(inputs: Inputs) -> tuple[Tensor, Tensor]:
    output, subject_loss = eager_maps(inputs)
    return output, subject_loss.detach() + 0 * subject_loss


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
    rows = [row for row in read_rows(tmp_path) if row["contender"] == "sefi-eager"]
    assert rows and not any(row["seconds"] for row in rows)


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


def test_ratios_of_the_cpu_stand_beside_their_targets() -> None:
    record = ProblemRecord(Problem("sd15", 4096, 40, 8), "float32", 4, "cpu", RATES)
    record.entries = [
        _entry("sefi-cpu", "sefi", 1.0, 100),
        _entry("eager-maps", "eager", 1.5, 2000),
        _entry("sdpa", "sdpa", 1.05, 100),
        _entry("sdpa-flash", "sdpa", 1.02, 100),
    ]
    record.matrix_seconds = {SGEMM_SAME: 0.7}
    name = "sd15 4096x40 b1"
    assert record.targets() == [
        (name, f"share of sgemm, {SGEMM_SAME}", 0.7, 0.65),
        (name, "times SDPA's speed without a loss", 1.02, 1.0),
        (name, "times eager maps' speed", 1.5, 1.6),
        (name, "times less extra memory than eager", 20.0, 10.0),
    ]
    assert targets_table(record.targets()).splitlines()[-1].split()[-2:] == ["20.00", "10.00"]
    record.problem = Problem("sd15", 1024, 80, 8)
    assert [target[3] for target in record.targets()] == [0.65, 1 / 1.1, 1.0, 10.0]
    record.entries[2].eager_times["both"] = Timing(1.05, 1.0, 0.6, 9)
    assert record.noisy and record.targets() == []
    record.entries[2].eager_times["both"] = Timing(1.05, 1.0, 0.1, 9)
    record.entries[0].wrong = "output is off"
    assert record.targets() == []


def test_ratios_of_cuda_are_of_the_fastest_backend_by_graph_replay() -> None:
    record = ProblemRecord(Problem("sd15", 4096, 40, 8, 8), "bfloat16", 2, "cuda", RATES)
    record.entries = [
        _entry("sefi-triton", "sefi", 1.0, 100),
        _entry("sefi-cuda", "sefi", 2.0, 50),
        _entry("sefi-eager", "sefi", 0.1, 50),
        _entry("eager-maps", "eager", 9.0, 2000),
        _entry("sdpa-cudnn", "sdpa", 1.5, 100),
    ]
    record.entries[1].graph_times["both"] = Timing(0.5, 0.5, 0.01, 9)
    assert [target[1:] for target in record.targets()] == [
        ("times SDPA's speed without a loss", 3.0, 1.0),
        ("times eager maps' speed", 18.0, 8.0),
        ("times less extra memory than eager", 40.0, 20.0),
    ]
    record.problem = Problem("sd15", 1024, 80, 8, 16)
    share = record.bound_of(record.entries[1], "both").seconds / 0.5
    assert record.targets()[1][1:] == ("share of the roofline", share, 0.8)
