"""step_bench on a very small model: its files, its targets, and a provider that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import step_bench
import torch
from common.models import SD15, SDXL, Architecture, TextShape, reduced
from common.report import Row, read_csv
from common.step_providers import SefiStep
from common.timing import Effort
from step_bench import INVERSION, NO_LOSS, PLAIN, PROVIDERS, SEFI, Entry, measure_steps, rows_of

CPU = torch.device("cpu")
SMALL = replace(
    reduced(SD15, quick=True),
    widths=(16, 16, 32, 32),
    heads=(1, 1, 1, 1),
    texts=(TextShape(32, 2, 1),),
    latent=8,
    vae_widths=(8, 8, 8, 8),
)
SMALL_XL = replace(
    reduced(SDXL, quick=True),
    widths=(16, 32, 32),
    heads=(1, 2, 2),
    layers=(1, 1, 2),
    texts=(TextShape(32, 2, 1), TextShape(48, 3, 2)),
    latent=8,
    vae_widths=(8, 8, 8, 8),
)
BUILT = {"sd15": SMALL, "sdxl": SMALL_XL}
SHORT = Effort(seconds=0.01, block=0.0, rounds=2)


@pytest.fixture(scope="module")
def measured() -> Callable[[str], list[Entry]]:
    found: dict[str, list[Entry]] = {}

    def measure(family: str) -> list[Entry]:
        if family not in found:
            found[family] = measure_steps(BUILT[family], 2, CPU, "float32", SHORT)
        return found[family]

    return measure


def make_step(built: Architecture, name: str, batch: int = 1) -> tuple[Any, Any]:
    provider = next(one for one in PROVIDERS if one.name == name)
    return step_bench.make_step(provider, built, batch, CPU, "float32")


@pytest.mark.parametrize(("family", "rel"), [("sd15", 1e-3), ("sdxl", 1e-4)])
def test_every_provider_is_measured_and_ours_has_the_losses_of_the_plain_method(
    family: str, rel: float, measured: Callable[[str], list[Entry]]
) -> None:
    rows = rows_of(measured(family), BUILT[family], 2, "float32")
    assert [row["provider"] for row in rows] == [SEFI, PLAIN, INVERSION, NO_LOSS]
    for row in rows:
        assert row["status"] == "pass"
        assert row["seconds"] > 0
        assert all(row[f"seconds_{part}"] > 0 for part in ("noise", "text", "U-Net forward"))
        encodes = row["provider"] == INVERSION
        assert (row["seconds_image"] > 0) == encodes, "only the peer encodes the image"
        assert 0 < row["held_bytes"] < row["peak_bytes"]
    # Only the peer holds each token table three more times: a copy and two moments.
    table = 49_408 * BUILT[family].context_width * 4
    held = {row["provider"]: row["held_bytes"] for row in rows}
    assert 2.5 * table < held[INVERSION] - held[SEFI] < 4 * table
    ours, plain = (entry.losses for entry in measured(family)[:2])
    assert ours[0][1] == pytest.approx(0, abs=1e-6), "at step 0 the maps are the reference's"
    assert ours[2][1] > 1e-6
    assert np.array(ours) == pytest.approx(np.array(plain), rel=rel, abs=1e-5)


def test_a_wrong_step_gets_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SefiStep.__call__

    def off(self: Any) -> tuple[float, float]:
        noise, subject_loss = step(self)
        return noise * 1.01, subject_loss

    monkeypatch.setattr(SefiStep, "__call__", off)
    entries = measure_steps(SMALL, 1, CPU, "float32", SHORT, providers=PROVIDERS[:2])
    wrong, plain = rows_of(entries, SMALL, 1, "float32")
    assert wrong["status"].startswith("fail: noise loss")
    assert "seconds" not in wrong and "peak_bytes" not in wrong and plain["seconds"] > 0
    assert "fail" in step_bench.rows_table([wrong, plain])


@pytest.mark.parametrize("family", BUILT)
def test_textual_inversion_changes_one_row_a_table(family: str) -> None:
    step, _ = make_step(BUILT[family], INVERSION)
    assert len(step._tables) == len(BUILT[family].texts)
    before = [table.detach().clone() for table in step._tables]
    step()
    for table, old, row in zip(step._tables, before, step._rows, strict=True):
        assert (table.detach() != old).any(1).nonzero().flatten().tolist() == row
        assert step._optimizer.state[table]["exp_avg"].shape == old.shape


def test_ratios_by_hand() -> None:
    def row(provider: str, seconds: float, peak: int, spread: float = 0.01) -> Row:
        found = {"model": "sd15", "batch": 1, "provider": provider, "seconds": seconds}
        return found | {"peak_bytes": peak, "spread": spread}

    rows = [row(SEFI, 1.0, 10), row(PLAIN, 2.0, 20), row(INVERSION, 0.9, 15)]
    on_cpu, on_cuda = (step_bench.targets(rows, device) for device in ("cpu", "cuda"))
    assert [target[0] for target in on_cpu] == ["sd15 b1"] * 3
    assert [target[2:] for target in on_cpu] == [(2.0, 1.0), (0.9, 1.0), (1.5, 1.0)]
    assert [target[3] for target in on_cuda] == [3.0, 1.0, 1.0]
    (only,) = step_bench.targets([*rows, row(NO_LOSS, 2.0, 9, spread=0.9)], "cpu")
    assert "memory" in only[1], "noisy times give no ratio of speeds"
    assert step_bench.targets(rows[1:], "cpu") == []


def test_the_command_writes_its_rows_environment_and_plot(
    tmp_path: Path,
    measured: Callable[[str], list[Entry]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(step_bench, "measure_steps", lambda *_: measured("sd15"))
    arguments = ["--device", "cpu", "--models", "sd15", "--seconds", "0.01", "--quick"]
    assert step_bench.main([*arguments, "--output", str(tmp_path)]) == 0
    assert len(read_csv(tmp_path / "step_bench.csv")) == 4
    environment = (tmp_path / "environment.json").read_text()
    assert json.loads(environment)["step_bench"]["settings"]["quick"] is True
    assert (tmp_path / "step_bench.png").read_bytes().startswith(b"\x89PNG")
    assert str(Path.home()) not in environment
    printed = capsys.readouterr().out
    assert "textual-inversion" in printed and "times less peak memory" in printed
