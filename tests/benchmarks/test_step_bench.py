"""step_bench on a very small model: its files, its targets, and a contender that is wrong."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import _plain_steps
import _step_models
import _step_run
import gpu_suite
import numpy as np
import pytest
import step_bench
import subjects_bench
import torch
from _measure import Effort, Timing
from _step_models import SD15, SDXL, Architecture, TextShape, random_pipeline, reduced
from _step_parts import PARTS, StepMemory, memory_of, profile_step
from _step_run import (
    CONTENDERS,
    INVERSION,
    NO_LOSS,
    PLAIN,
    SEFI,
    StepEntry,
    StepRecord,
    config_of,
    measure_steps,
    picture,
)

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
SHORT = Effort(seconds=0.01, block=0.0, rounds=2)


@pytest.fixture(scope="module")
def record() -> StepRecord:
    return measure_steps(SMALL, 2, CPU, torch.float32, SHORT)


@pytest.fixture(scope="module")
def record_xl() -> StepRecord:
    return measure_steps(SMALL_XL, 2, CPU, torch.float32, SHORT)


def make_step(built: Architecture, name: str, batch: int = 1) -> tuple[Any, Any]:
    """A contender's step on a CPU, and its pipeline."""
    pipe = random_pipeline(built, CPU, torch.float32)
    chosen = next(one for one in CONTENDERS if one.name == name)
    config = config_of(chosen, batch, torch.float32)
    return chosen.make(pipe, config, picture(8 * built.latent), torch.float32), pipe


@pytest.mark.parametrize("name", ["record", "record_xl"])
def test_every_contender_is_measured(name: str, request: pytest.FixtureRequest) -> None:
    record: StepRecord = request.getfixturevalue(name)
    assert [entry.contender.name for entry in record.entries] == [SEFI, PLAIN, INVERSION, NO_LOSS]
    for entry in record.entries:
        assert entry.problem is None
        assert entry.timing is not None and entry.timing.median > 0
        assert set(entry.parts) == set(PARTS)
        assert all(entry.parts[part] > 0 for part in ("draw", "text", "U-Net forward", "backward"))
        encodes = entry.contender.name == INVERSION
        assert (entry.parts["picture"] > 0) == encodes, "only the peer encodes the image"
        assert entry.memory is not None and 0 < entry.memory.held < entry.memory.peak
    # The peer holds each table, its originals and two moments of it, which nobody else does.
    table = 49_408 * record.built.context_width * 4
    held = {entry.contender.name: entry.memory.held for entry in record.entries if entry.memory}
    assert 2.5 * table < held[INVERSION] - held[SEFI] < 4 * table


def test_sefi_and_the_plain_method_see_the_same(record: StepRecord) -> None:
    ours, plain = record.entry(SEFI).numbers, record.entry(PLAIN).numbers
    assert ours[0][1] == pytest.approx(0, abs=1e-6), "at step 0 the maps are the reference's"
    assert ours[2][1] > 1e-5
    assert [pair[0] for pair in ours] == pytest.approx([pair[0] for pair in plain], rel=1e-3)


def test_sefi_and_the_plain_method_see_the_same_of_sdxl(
    record_xl: StepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = record_xl.entry(SEFI).numbers, record_xl.entry(PLAIN).numbers
    assert ours[2][1] > 1e-6
    assert np.array(ours) == pytest.approx(np.array(plain), rel=1e-4, abs=1e-9)
    # What the U-Net is told beside the words is seen in these numbers.
    added = _plain_steps._added
    for left_out in ("text_embeds", "time_ids"):

        def less(*arguments: Any, left_out: str = left_out) -> Any:
            given = added(*arguments)
            return {**given, left_out: torch.zeros_like(given[left_out])}

        monkeypatch.setattr(_plain_steps, "_added", less)
        step, _ = make_step(SMALL_XL, PLAIN, batch=2)
        assert step()[0] != pytest.approx(ours[0][0], rel=1e-4)


def test_full_width_is_the_public_config_of_sdxl() -> None:
    with torch.device("meta"):
        unet = _step_models._unet(SDXL)
    # What stabilityai/stable-diffusion-xl-base-1.0 has.
    assert sum(weight.numel() for weight in unet.parameters()) == 2_567_463_684
    assert unet.config.projection_class_embeddings_input_dim == 2816
    assert unet.config.cross_attention_dim == 2048
    small = reduced(SDXL, quick=True)
    assert small.heads == (1, 2, 4) and small.latent == 16
    assert {width // heads for width, heads in zip(small.widths, small.heads, strict=True)} == {64}


def test_a_wrong_step_gets_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _step_run.SefiStep.__call__

    def off(self: Any) -> tuple[float, float]:
        noise, subject_loss = step(self)
        return noise * 1.01, subject_loss

    monkeypatch.setattr(_step_run.SefiStep, "__call__", off)
    found = measure_steps(SMALL, 1, CPU, torch.float32, SHORT, contenders=CONTENDERS[:2])
    wrong = found.entry(SEFI)
    assert wrong.problem is not None and wrong.problem.startswith("wrong: noise loss")
    assert wrong.timing is None and wrong.memory is None
    assert found.entry(PLAIN).timing is not None
    assert "wrong" in step_bench.record_table(found)


@pytest.mark.parametrize("built", [SMALL, SMALL_XL], ids=["sd15", "sdxl"])
def test_textual_inversion_changes_one_row_a_table(built: Architecture) -> None:
    step, pipe = make_step(built, INVERSION)
    assert len(step._tables) == len(built.texts)
    before = [table.detach().clone() for table in step._tables]
    step()
    for table, old, row in zip(step._tables, before, step._rows, strict=True):
        assert (table.detach() != old).any(1).nonzero().flatten().tolist() == row
        assert step._optimizer.state[table]["exp_avg"].shape == old.shape


def test_parts_are_told_by_what_a_step_calls() -> None:
    step, pipe = make_step(SMALL, SEFI)
    backward = torch.autograd.backward
    hooks = len(pipe.unet.conv_out._forward_hooks)
    parts = profile_step(step, pipe, CPU, repeats=1)
    assert torch.autograd.backward is backward and len(pipe.unet.conv_out._forward_hooks) == hooks
    assert parts["backward"] > parts["loss"] and parts["U-Net forward"] > parts["loss"]


def test_the_text_part_counts_both_encoders() -> None:
    step, pipe = make_step(SMALL_XL, SEFI)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.get_input_embeddings().register_forward_hook(lambda *_: time.sleep(0.2))
    assert profile_step(step, pipe, CPU, repeats=1)["text"] > 0.4


def test_memory_counts_what_is_held_and_the_highest_point() -> None:
    def build() -> Any:
        weights = torch.ones(1_000_000)

        def step() -> float:
            return float((weights * 2).sum())

        return step

    memory = memory_of(build, CPU)
    assert 4_000_000 <= memory.held < 4_010_000
    assert 8_000_000 <= memory.peak < 8_020_000


def made(device: str, seconds: dict[str, float], peaks: dict[str, int]) -> StepRecord:
    entries = []
    for contender in CONTENDERS:
        entry = StepEntry(contender)
        entry.timing = Timing(seconds[contender.name], 0.1, 0.01, 5)
        entry.memory = StepMemory(1, peaks[contender.name])
        entries.append(entry)
    return StepRecord(SD15, 1, "float32", device, entries)


def test_ratios_by_hand() -> None:
    seconds = {SEFI: 1.0, PLAIN: 2.0, INVERSION: 0.9, NO_LOSS: 0.5}
    peaks = {SEFI: 10, PLAIN: 20, INVERSION: 15, NO_LOSS: 9}
    on_cpu, on_cuda = (made(device, seconds, peaks).targets() for device in ("cpu", "cuda"))
    assert [target[0] for target in on_cpu] == ["sd15 b1"] * 3
    assert [target[2:] for target in on_cpu] == [(2.0, 1.0), (0.9, 1.0), (1.5, 1.0)]
    assert [target[3] for target in on_cuda] == [3.0, 1.0, 1.0]
    noisy = made("cpu", seconds, peaks)
    noisy.entries[1].timing = Timing(2.0, 0.1, 0.9, 5)
    assert ["memory" in target[1] for target in noisy.targets()] == [True], "noise tells no speed"


def test_the_command_writes_its_rows_environment_and_picture(
    tmp_path: Path,
    record: StepRecord,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(step_bench, "measure_steps", lambda *_: record)
    arguments = ["--device", "cpu", "--models", "sd15", "--seconds", "0.01", "--quick"]
    assert step_bench.main([*arguments, "--output", str(tmp_path)]) == 0
    with (tmp_path / "step_bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    environment = (tmp_path / "environment.json").read_text()
    assert json.loads(environment)["step_bench"]["settings"]["quick"] is True
    assert (tmp_path / "step_bench.png").read_bytes().startswith(b"\x89PNG")
    assert str(Path.home()) not in environment
    printed = capsys.readouterr().out
    assert (
        "(c) textual-inversion" in printed
        and "times less peak memory than Textual Inversion" in printed
    )


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_bench.parse(["--batches", "0"])
    assert "each must be at least 1" in capsys.readouterr().err
    assert step_bench.main(["--device", "tpu"]) == 2


def test_the_suite_names_what_failed_or_had_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(options: Any) -> Any:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(step_bench, "run", fails)
    monkeypatch.setattr(subjects_bench, "run", lambda options: {"results": [1]})
    found = gpu_suite.measure_training(CPU, float("inf"), tmp_path)
    assert found == {
        "step_bench": "failed: RuntimeError: out of registers",
        "subjects_bench": "1 rows",
    }
    late = gpu_suite.measure_training(CPU, 0.0, tmp_path)
    assert set(late.values()) == {"left out for time"}
