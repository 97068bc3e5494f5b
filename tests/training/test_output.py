"""Outputs that cannot be written are told before training; every other one is written."""

from __future__ import annotations

import errno
import os

import pytest

import sefi_fast
from sefi_fast.subject import Subject
from sefi_fast.training.checkpoint import folder_of

PICTURE = sefi_fast.bundled_subject_image()
QUICK = {"steps": 2, "batch_size": 1, "stages": 1, "progress": False}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with links that lead nowhere; loading a model fails the test."""

    def loaded(*arguments, **settings):
        raise AssertionError("training began")

    for module in ("trainer", "many"):
        monkeypatch.setattr(f"sefi_fast.training.{module}.running", loaded)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "summary.jsonl").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "output",
    ["nowhere", "nowhere/me", "nowhere/new/me", "m" * 256, "new/" + "m" * 256, "x" * 256 + "/me"],
)
def test_an_output_that_cannot_be_written_is_told_before_training(place, output):
    before = sorted(os.listdir(place))
    with pytest.raises(OSError, match=r"output .* cannot be written.*(leads nowhere|too long)"):
        sefi_fast.train(PICTURE, output=place / output, **QUICK)
    with pytest.raises(OSError, match=r"leads nowhere|too long"):
        sefi_fast.train_many([PICTURE], output=place / output, **QUICK)
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_save_that_will_fail_is_told_before_training(place, monkeypatch, call):
    def fail(*arguments):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, call, fail)
    for output in ("me.safetensors", "new/me.safetensors"):
        with pytest.raises(OSError, match="not permitted.*choose another place"):
            sefi_fast.train(PICTURE, output=place / output, **QUICK)


def test_a_summary_that_cannot_be_written_is_told_before_training(place):
    with pytest.raises(OSError, match=r"summary\.jsonl is a folder"):
        sefi_fast.train_many([PICTURE], output=place, **QUICK)


def test_a_name_as_long_as_can_be_is_trained_with_checkpoints(tmp_path):
    output = tmp_path / ("m" * 243 + ".safetensors")
    kept = []

    class Look(sefi_fast.training.Callbacks):
        def on_checkpoint(self, step, path):
            kept.append(path)

    sefi_fast.train(PICTURE, output=output, checkpoint_every=1, callback=Look(), **QUICK)
    assert kept and kept[0].parent == folder_of(output)
    assert os.listdir(tmp_path) == [output.name]


def test_an_output_that_is_a_link_is_written_through(tmp_path):
    target, link = tmp_path / "far" / "me.safetensors", tmp_path / "me.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"before")
    link.symlink_to(target)
    sefi_fast.train(PICTURE, output=link, **QUICK)
    assert link.is_symlink() and Subject.load(target).stages == 1


def test_a_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    picture = tmp_path / "home" / "me.png"
    picture.write_bytes(PICTURE.read_bytes())
    sefi_fast.train("~/me.png", output="~/out/me.safetensors", **QUICK)
    loaded = Subject.load("~/out/me.safetensors")
    loaded.save("~/out/copy.safetensors")
    sefi_fast.export_embedding(loaded, "~/out/e.safetensors", lossy=True)
    sefi_fast.TrainConfig(steps=7).save("~/out/c.yaml")
    assert sefi_fast.TrainConfig.load("~/out/c.yaml").steps == 7
    (result,) = sefi_fast.train_many(["~/me.png"], output="~/many", **QUICK)
    assert result.path == tmp_path / "home" / "many" / "me.safetensors"
    pipe = sefi_fast.attach(sefi_fast.load_pipeline(), "~/out/me.safetensors")
    sefi_fast.detach(pipe)
    sefi_fast.import_embedding("~/out/e.safetensors", pipe, class_word="creature")
    files = {path.name for path in (tmp_path / "home" / "out").iterdir()}
    assert files == {"me.safetensors", "copy.safetensors", "e.safetensors", "c.yaml"}
    assert os.listdir(tmp_path) == ["home"]
