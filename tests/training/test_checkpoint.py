"""Checkpoint files: whole or not at all, every damage seen, the newest kept."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import torch
from safetensors.torch import save

from sefi_fast.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    CheckpointInterval,
    discard,
    folder_of,
    read_checkpoint,
)


def make(step=4, size=300):
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "engine.parameters.rows": torch.randn(5, size, generator=generator),
        "engine.step": torch.tensor(step),
        "engine.generator": generator.get_state(),
        "history.loss": torch.rand(step, generator=generator, dtype=torch.float64),
        "history.skipped": torch.empty(0, dtype=torch.int64),
    }
    return Checkpoint(step, {"steps": 9, "scene": None}, {"placeholder": "<it>"}, tensors)


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "me.safetensors.checkpoints", keep=2)


def test_a_checkpoint_is_read_as_it_was_written(folder):
    written = make()
    path = folder.write(written)
    assert path.name == "step-000004.safetensors" and path.parent == folder.path
    read = read_checkpoint(folder.file(4))
    assert (read.step, read.settings, read.identity) == (4, written.settings, written.identity)
    assert read.tensors.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
    assert read.part("history").keys() == {"loss", "skipped"}
    assert os.listdir(folder.path) == [path.name]


def test_a_file_with_a_bit_flipped_or_cut_anywhere_is_refused(folder):
    path = folder.write(make(size=4))
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    lengths = (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 9 + header, len(content) - 1)
    damaged = [content + b"\0", *(content[:length] for length in lengths)]
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(content), (200,), generator=generator).tolist()
    for place in [*range(12), *places]:
        changed = bytes([content[place] ^ 1 << place % 8])
        damaged.append(content[:place] + changed + content[place + 1 :])
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


OURS = {"format": "sefi_fast.checkpoint", "format_version": "2", "library_version": "9.0"}
X = {"x": torch.ones(3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (save(X, {"format": "pt"}), "is not a checkpoint of sefi_fast"),
        (save(X), "is not a checkpoint of sefi_fast"),
        (b"\x80\x04\x95pickled" * 20, "damaged"),
        (save(X, OURS), r"written by sefi_fast 9\.0 .* update"),
        (save(X, {**OURS, "format_version": "x"}), "damaged: its format_version is 'x'"),
    ],
)
def test_foreign_and_missing_and_newer_files_are_named(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_the_newest_stay_and_leftovers_of_kills_go(folder):
    for step in (2, 4, 6):
        folder.write(make(step))
    (folder.path / ".step-000008.safetensors.0123abcd").write_bytes(b"half")
    (folder.path / "notes.txt").write_text("mine")
    folder.prune(6)
    assert folder.steps() == [6, 4]
    assert sorted(os.listdir(folder.path))[0] == "notes.txt"
    folder.clear()
    assert os.listdir(folder.path) == ["notes.txt"]


def test_checkpoints_from_before_an_older_one_was_resumed_do_not_crowd_out_the_new(folder):
    for step in (2, 9, 8):
        folder.write(make(step))
    folder.write(make(3))
    folder.prune(3)
    assert folder.steps() == [3, 2]


def test_discard_leaves_no_trace(tmp_path):
    output = tmp_path / "me.safetensors"
    CheckpointFolder(folder_of(output)).write(make())
    discard(output)
    discard(output)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("full", ["disk", "limit"])
def test_a_full_disk_or_a_limit_leaves_the_older_checkpoint_alone(folder, monkeypatch, full):
    folder.write(make(2))
    before = os.listdir(folder.path)

    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full == "disk":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left|too large"):
            folder.write(make(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(folder.path) == before and read_checkpoint(folder.file(2)).step == 2


def test_a_file_in_the_folders_place_is_an_error(folder, tmp_path):
    for free in (folder, CheckpointFolder(tmp_path)):
        free.check()
    folder.path.write_text("a file")
    with pytest.raises(FileExistsError, match="it is a file"):
        folder.check()


def test_a_link_among_the_checkpoints_goes_and_its_target_stays(folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder.path.mkdir()
    for name in ("step-000001", "step-000002", "step-000004"):
        (folder.path / f"{name}.safetensors").symlink_to(precious)
    folder.write(make(4))
    folder.write(make(6))
    folder.prune(6)
    assert folder.steps() == [6, 4] and not folder.file(4).is_symlink()
    folder.file(5).symlink_to(precious)
    folder.clear()
    assert not folder.path.exists()
    assert precious.read_text() == "precious"


def test_a_linked_folder_is_refused_and_stays(tmp_path):
    target = CheckpointFolder(tmp_path / "target")
    target.write(make())
    link = CheckpointFolder(tmp_path / "me.safetensors.checkpoints")
    link.path.symlink_to(target.path)
    with pytest.raises(FileExistsError, match="it is a link"):
        link.check()
    link.clear()
    link.prune(9)
    discard(tmp_path / "me.safetensors")
    assert target.steps() == [4] and link.steps() == []


def test_the_interval_between_checkpoints(monkeypatch):
    every = CheckpointInterval(3)
    assert [step for step in range(1, 10) if every.due(step)] == [3, 6, 9]
    assert not any(CheckpointInterval(0).due(step) for step in range(1, 10))
    now = [0.0]
    monkeypatch.setattr("sefi_fast.training.checkpoint.time.perf_counter", lambda: now[0])
    by_time = CheckpointInterval(None)
    due = []
    for second in range(400):
        now[0] = float(second)
        if by_time.due(second):
            due.append(second)
            # Two seconds of writing are a fiftieth of a hundred.
            by_time.written(2.0)
    assert due == [60, 160, 260, 360]
