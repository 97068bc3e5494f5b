"""Many subjects together: each as if alone, failures kept apart, nothing lost or done twice."""

from __future__ import annotations

import json
import logging
import os
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training.shared import FAST as THREE
from training.shared import assert_near, checkpoints, raising, random_image

import sefi_fast
from sefi_fast.subject import Subject
from sefi_fast.training import (
    ManifestError,
    NonFiniteLossError,
    TrainingInterrupted,
)
from sefi_fast.training import many as many_module
from sefi_fast.training.base_model import BaseModel
from sefi_fast.training.checkpoint import folder_of
from sefi_fast.training.engine import Engine
from sefi_fast.training.manifest import Shard
from sefi_fast.training.subject_state import SubjectSpec, SubjectState
from sefi_fast.training.summary import FILE as SUMMARY
from sefi_fast.training.summary import ManyResult, Summary, row_of

FAST: dict[str, Any] = {**THREE, "steps": 4}
WORDS = ("cat", "dog", "car")


def subjects(count: int = 3) -> list[dict[str, Any]]:
    return [
        {"image": random_image(n), "name": f"s{n}", "class_word": WORDS[n % 3], "seed": 10 + n}
        for n in range(count)
    ]


def summary_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "summary.jsonl").read_text().splitlines()]


@pytest.fixture
def train_many(sd15_pipeline, tmp_path):
    """Train many subjects of the random pipeline, into `tmp_path`."""
    usual = {"model": sd15_pipeline, "output": tmp_path, **FAST}
    return lambda given, **settings: sefi_fast.train_many(given, **{**usual, **settings})


def test_each_is_as_if_alone(train_many, sd15_pipeline, tmp_path):
    results = train_many(subjects(), batch_subjects=2, scene="at night")
    assert [result.name for result in results] == ["s0", "s1", "s2"]
    for number, (result, given) in enumerate(zip(results, subjects(), strict=True)):
        alone = sefi_fast.train(
            given["image"], model=sd15_pipeline, class_word=given["class_word"],
            placeholder=f"<s{number}>", seed=given["seed"], scene="at night", **FAST,
        )  # fmt: skip
        assert result.error is None and not result.before
        assert_near(result.subject, alone)
        loaded = Subject.load(tmp_path / f"s{number}.safetensors")
        assert torch.equal(loaded.tokens[0], result.subject.tokens[0])
        assert (loaded.placeholder, loaded.class_word) == (f"<s{number}>", given["class_word"])
        assert loaded.settings["seed"] == given["seed"]
    rows = summary_of(tmp_path)
    assert [(row["name"], row["state"], row["steps"]) for row in rows] == [
        (f"s{n}", "trained", 4) for n in range(3)
    ]
    assert sorted(os.listdir(tmp_path)) == [*(f"s{n}.safetensors" for n in range(3)), SUMMARY]


def test_class_words_of_different_lengths_train_in_batches_of_their_own(train_many, sd15_pipeline):
    words = ("cat", "red cat", "dog", "wibble", "old dog")
    given = [
        {"image": random_image(n), "name": word, "class_word": word} for n, word in enumerate(words)
    ]
    results = train_many(given)
    assert [result.name for result in results] == list(words)
    assert "falls into pieces" in str(results[3].error)
    for number in (0, 1, 4):
        alone = sefi_fast.train(
            random_image(number), model=sd15_pipeline, class_word=words[number], **FAST
        )
        assert results[number].subject.num_vectors == len(words[number].split())
        assert_near(results[number].subject, alone)


def test_subjects_of_sdxl_train_as_if_alone(sdxl_pipeline, photo, tmp_path):
    given = [
        {"image": photo, "name": "a", "class_word": "cat"},
        {"image": photo.rotate(90, expand=True), "name": "b", "class_word": "dog"},
        {"image": photo, "name": "c", "class_word": "wibble"},
    ]
    arguments = {"model": sdxl_pipeline, **FAST}
    results = sefi_fast.train_many(given, output=tmp_path, **arguments)
    assert "text encoder 1 of 2, the class word 'wibble'" in str(results[2].error)
    for result, one in zip(results[:2], given, strict=False):
        alone = sefi_fast.train(one["image"], class_word=one["class_word"], **arguments)
        assert result.subject.history.loss == pytest.approx(alone.history.loss, rel=1e-4)
        for ours, theirs in zip(Subject.load(result.path).tokens, alone.tokens, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    again = sefi_fast.train_many(given[:2], output=tmp_path, **arguments)
    assert [result.before for result in again] == [True, True]


def test_failures_are_kept_apart(train_many, tmp_path, monkeypatch, caplog):
    damaged = tmp_path / "damaged.png"
    random_image(0).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:200])
    step = Engine.step

    def poisoned(self: Engine) -> list[Any]:
        results = step(self)
        # The second index of the three that are left is the subject "s1".
        if len(results) > 1 and results[1] is not None:
            results[1] = results[1]._replace(noise=float("nan"), finite=False)
        return results

    monkeypatch.setattr(Engine, "step", poisoned)
    given = subjects()
    given.insert(0, {"image": damaged, "class_word": "cat"})
    given.append({"image": random_image(9), "class_word": "supercalifragilistic", "name": "long"})
    with caplog.at_level(logging.WARNING):
        results = train_many(given, output=tmp_path / "out")
    states = {result.name: result.error for result in results}
    assert isinstance(states["damaged"], sefi_fast.errors.ImageError)
    assert isinstance(states["s1"], NonFiniteLossError)
    assert isinstance(states["long"], sefi_fast.errors.PromptError)
    assert states["s0"] is None and states["s2"] is None
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == ["s0.safetensors", "s2.safetensors"]
    rows = {row["name"]: row for row in summary_of(tmp_path / "out")}
    assert rows["s1"]["state"] == "failed" and "NonFiniteLossError" in rows["s1"]["error"]
    assert "damaged (subject 1) is skipped" in caplog.text


class RaisingImage(Image.Image):
    """An image whose decoder fails in a way of its own."""

    def load(self) -> Any:
        raise NotImplementedError("Unimplemented pixel format")

    copy = load


def damage_checkpoint(output: Path) -> None:
    folder_of(output).mkdir()
    checkpoints(output).file(2).write_bytes(b"damaged")


BAD_ENTRIES: dict[str, dict[str, Any]] = {
    "image": {"image": RaisingImage()},
    "array": {"image": np.array(object())},
    "surrogate": {"class_word": "ca\udc80t"},
    "long": {"class_word": "cat " * 99},
    "scene": {"scene": "at \ud800"},
}
BAD_OUTPUTS = {
    "checkpoint": damage_checkpoint,
    "folder": Path.mkdir,
    "link": lambda output: output.symlink_to(output.with_name("gone") / "away"),
    "in the way": lambda output: folder_of(output).write_text("a file"),
}


@pytest.mark.parametrize("bad", [*BAD_ENTRIES, *BAD_OUTPUTS])
def test_one_bad_subject_ends_no_run(train_many, tmp_path, bad):
    entry = {"image": random_image(7), "name": "bad", "class_word": "cat"}
    entry |= BAD_ENTRIES.get(bad, {})
    if bad in BAD_OUTPUTS:
        BAD_OUTPUTS[bad](tmp_path / "bad.safetensors")
    given = [entry, *subjects(1)]
    for before in (False, True):
        results = train_many(given, steps=1)
        assert results[0].error is not None and results[0].subject is None
        assert results[1].error is None and results[1].before is before
        rows = summary_of(tmp_path)
        assert [row["state"] for row in rows] == ["failed", "before" if before else "trained"]


def fail_for_the_second(monkeypatch: Any, owner: type, name: str) -> None:
    """Let a method of SubjectState or Engine raise where the subject of seed 11 takes part."""
    honest = getattr(owner, name)

    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if owner is SubjectState:
            spec = arguments[0] if name == "__init__" else self.spec
            seeds = [spec.seed]
        else:
            seeds = [generator.initial_seed() for generator in self._sampler._generators]
        if 11 in seeds:
            raise KeyError("something unforeseen")
        return honest(self, *arguments, **keywords)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (SubjectState, "__init__"),
        (SubjectState, "_start_tokens"),
        (SubjectState, "record"),
        (SubjectState, "subject"),
        (Engine, "step"),
    ],
)
def test_any_error_of_a_subject_is_its_own_failure(train_many, tmp_path, monkeypatch, owner, name):
    fail_for_the_second(monkeypatch, owner, name)
    for before in (False, True):
        results = train_many(subjects(), steps=1)
        assert [type(result.error) for result in results] == [type(None), KeyError, type(None)]
        assert [result.before for result in results] == [before, False, before]
    monkeypatch.undo()
    results = train_many(subjects(), steps=1)
    assert [result.before for result in results] == [True, False, True]
    assert all(result.error is None for result in results)
    assert sorted(os.listdir(tmp_path)) == [*(f"s{n}.safetensors" for n in range(3)), SUMMARY]


def test_errors_hold_no_images_and_no_model(train_many):
    (result,) = train_many([{"image": RaisingImage(), "class_word": "cat"}])
    error: BaseException | None = result.error
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            held = frame.f_locals.values()
            assert not any(isinstance(x, (Image.Image, BaseModel, SubjectState)) for x in held)
        error = error.__cause__


@pytest.mark.parametrize("ended", ["checkpoint", "empty", "overwritten"])
def test_leftovers_of_a_kill_after_a_subject_is_saved_go(train_many, tmp_path, ended):
    train_many(subjects(1))
    output = tmp_path / "s0.safetensors"
    folder_of(output).mkdir()
    partial = tmp_path / ".summary.jsonl.0123abcd"
    part = tmp_path / ".summary.jsonl.2-of-4"
    for path in (partial, part):
        path.write_text("half")
    if ended != "empty":
        checkpoint = folder_of(output) / "step-000002.safetensors"
        checkpoint.write_bytes(b"half")
        finished = output.stat().st_mtime_ns
        later = finished + (10**9 if ended == "overwritten" else 0)
        os.utime(checkpoint, ns=(later, later))
    (again,) = train_many(subjects(1))
    assert again.before
    # A newer checkpoint is of a run that was going to overwrite the file.
    left = [folder_of(output).name] if ended == "overwritten" else []
    assert sorted(os.listdir(tmp_path)) == [output.name, *left, SUMMARY]


def test_a_summary_holds_any_text(tmp_path):
    spec = SubjectSpec(image=tmp_path / "\udcff.png", name="\ud800", where="line 1")
    result = ManyResult(spec.name, None, None, ValueError("\x1b[31m\udc80" + "x" * 10**6))
    Summary(tmp_path, Shard()).write([row_of(0, spec, result)])
    (row,) = summary_of(tmp_path)
    assert (row["name"], row["image"]) == ("\ud800", str(spec.image))
    assert row["error"].startswith(r"ValueError: \x1b[31m\udc80x") and len(row["error"]) < 3000


def test_a_summary_that_cannot_be_written_costs_no_result(train_many, monkeypatch, caplog):
    monkeypatch.setattr(Summary, "write", raising(OSError(28, "No space left on device")))
    (result,) = train_many(subjects(1))
    assert result.error is None
    assert "the summary could not be written" in caplog.text


def test_finished_ones_are_skipped_and_the_missing_made_good(train_many, tmp_path):
    first = train_many(subjects())
    (tmp_path / "s1.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    again = train_many(subjects())
    assert [result.before for result in again] == [True, False, True]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert torch.equal(again[0].subject.tokens[0], first[0].subject.tokens[0])
    assert_near(again[1].subject, first[1].subject)
    assert [row["state"] for row in summary_of(tmp_path)] == ["before", "trained", "before"]


def test_files_of_other_settings_or_another_image_stay(train_many, tmp_path):
    file = tmp_path / "s0.png"
    random_image(1).save(file)
    given = [{"image": str(file), "class_word": "cat"}, subjects(2)[1]]
    train_many(given)
    random_image(2).save(file)
    (tmp_path / "s1.safetensors").write_bytes(b"something else")
    content = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    results = train_many(given, steps=2)
    assert "steps was 4, is 2" in str(results[0].error)
    assert "image was" in str(results[0].error)
    assert "s1.safetensors is damaged" in str(results[1].error)
    assert {path: path.read_bytes() for path in content} == content
    results = train_many(given, overwrite=True, steps=2)
    assert [len(result.subject.history.loss) for result in results] == [2, 2]


def test_an_interrupted_group_goes_on_from_its_checkpoints(train_many, tmp_path, monkeypatch):
    whole = train_many(subjects(), output=tmp_path / "whole")
    folder = tmp_path / "parts"
    step = Engine.step
    calls: list[None] = []

    def interrupted(self: Engine) -> list[Any]:
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), 15)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(TrainingInterrupted, match="2 of 3 subjects trained") as caught:
        train_many(subjects(), output=folder, batch_subjects=2)
    assert caught.value.signal == 15
    assert [row["state"] for row in summary_of(folder)] == ["trained", "trained", "open"]
    assert folder_of(folder / "s2.safetensors").is_dir()
    results = train_many(subjects(), output=folder, batch_subjects=2)
    assert [result.before for result in results] == [True, True, False]
    assert len(calls) == 8, "the last subject went on from step 3 of 4"
    assert not folder_of(folder / "s2.safetensors").exists()
    assert_near(results[2].subject, whole[2].subject)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("could not create a primitive"),
    ],
    ids=["CUDA", "oneDNN"],
)
def test_too_many_for_the_memory(train_many, monkeypatch, caplog, error):
    step = Engine.step
    sizes: list[int] = []

    def narrow(self: Engine) -> list[Any]:
        sizes.append(len(self.active))
        if len(self.active) > 1:
            raise error
        return step(self)

    monkeypatch.setattr(Engine, "step", narrow)
    with caplog.at_level(logging.WARNING):
        results = train_many(subjects(4), batch_subjects=3, steps=1)
    assert sizes == [3, 2, 1, 1, 1, 1]
    assert all(result.error is None for result in results)
    assert "3 subjects at once are too many for the memory" in caplog.text
    assert "from here on 2 at once" in caplog.text


def test_an_error_of_every_step_is_of_the_subjects_or_of_the_run(train_many, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "step", raising(MemoryError()))
    results = train_many(subjects(2))
    assert all("too small for even one subject" in str(result.error) for result in results)
    assert [row["state"] for row in summary_of(tmp_path)] == ["failed", "failed"]
    monkeypatch.setattr(Engine, "step", raising(RuntimeError("a kernel is broken")))
    with pytest.raises(RuntimeError, match="a kernel is broken"):
        train_many(subjects(2))
    assert [row["state"] for row in summary_of(tmp_path)] == ["open", "open"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "some/model"}, ManifestError, "subject 1: class_word is missing"),
        ({"attention_loss": "mask"}, ManifestError, "subject 1: there is no mask"),
        ({"batch_subjects": 0}, ValueError, "batch_subjects must be at least 1, got 0"),
        ({"batch_subjects": 2.5}, TypeError, "batch_subjects must be a whole number"),
        ({"stepz": 2}, TypeError, "stepz"),
        ({"output": "file"}, NotADirectoryError, "is a file"),
        ({"output": "file/below"}, OSError, "cannot be written"),
    ],
)
def test_bad_arguments_are_errors_before_anything(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(error, match=message):
        sefi_fast.train_many([random_image(0)], **{"output": tmp_path, **arguments})
    assert os.listdir(tmp_path) == ["file"]


def test_a_device_for_all_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(many_module, "current_shard", lambda: Shard(0, 2))
    with pytest.raises(ValueError, match="would put all 2 processes on one device"):
        sefi_fast.train_many([random_image(0)], output=tmp_path, device="cuda:1")


def test_each_result_is_reported_when_its_file_is_there(train_many):
    told = []

    def tell(result):
        told.append(result)
        assert result.path is None or result.path.is_file()

    given = [*subjects(2), {"image": random_image(0), "name": "bad", "class_word": "wibble"}]
    results = train_many(given, batch_subjects=1, on_result=tell)
    assert told == results and results[2].error is not None
    again = train_many(given[:2], on_result=tell)
    assert told[3:] == again and all(result.before for result in again)


def test_an_exception_of_on_result_loses_no_training(train_many):
    def fail(result):
        raise RuntimeError(f"no more after {result.name}")

    with pytest.raises(RuntimeError, match="no more after s0"):
        train_many(subjects(2), batch_subjects=1, on_result=fail)
    results = train_many(subjects(2))
    assert [result.before for result in results] == [True, False]


def test_the_command(tmp_path, capsys):
    from sefi_fast.cli import main

    folder = tmp_path / "images"
    folder.mkdir()
    random_image(0).save(folder / "one.png")
    random_image(1).save(folder / "two.png")
    (folder / "two.png").write_bytes((folder / "two.png").read_bytes()[:300])
    out = tmp_path / "out"
    options = ["--steps", "1", "--batch-size", "1", "--resolution", "32", "--quiet"]
    assert main(["train-many", str(folder), "--output", str(out), *options]) == 1
    assert ", 1 failed: two\n" in capsys.readouterr().out
    (folder / "two.png").unlink()
    assert main(["train-many", str(folder), "--output", str(out), *options]) == 0
    assert ", 1 existed already\n" in capsys.readouterr().out
    assert main(["train-many", str(out), "--output", str(out)]) == 1
    assert "holds no image" in capsys.readouterr().err
