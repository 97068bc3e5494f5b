"""sample_bench: a quick run on the bundled model, its targets, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sample_bench
from common.report import read_csv
from common.timing import Timing


def test_a_quick_run_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample_bench.main(["--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "sample_bench.csv")
    assert [row["subjects"] for row in rows if row["call"] == "attach"] == [1, 10, 100]
    assert len(rows) == 4 + 3 * 3 and all(row["seconds"] > 0 for row in rows)
    assert json.loads((tmp_path / "environment.json").read_text())["sample_bench"]["settings"]
    assert "bare pipeline" in capsys.readouterr().out


def test_ratios_compare_in_the_right_direction() -> None:
    def timings(subject: float, traced: float) -> dict[str, Timing]:
        seconds = (1.0, subject, traced)
        names = (sample_bench.BARE, sample_bench.SUBJECT, sample_bench.TRACED)
        return {n: Timing(x, x, 0.0, 3) for n, x in zip(names, seconds, strict=True)}

    for seconds, enough in (((1.0, 1.04), [True, True]), ((1.1, 1.2), [False, False])):
        found = sample_bench.targets_of(timings(*seconds))
        assert [measured >= target for _, _, measured, target in found] == enough
