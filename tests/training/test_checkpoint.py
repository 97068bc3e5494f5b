"""Checkpoint files: whole or not at all, every damage seen, the newest kept."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import torch

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


def test_one_state_is_one_file_byte_for_byte(tmp_path):
    first, second = (CheckpointFolder(tmp_path / name).write(make()) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_file_cut_anywhere_is_refused(folder):
    path = folder.write(make())
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 9 + header, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(folder.file(4))
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(folder.file(4))


def test_every_flipped_bit_is_seen(folder):
    path = folder.write(make(size=4))
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(content), (200,), generator=generator).tolist()
    for place in [*range(12), *places]:
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_checkpoint(folder.file(4))
        content[place] ^= 1 << place % 8
    path.write_bytes(content)
    assert read_checkpoint(folder.file(4)).step == 4


def test_foreign_and_missing_and_newer_files_are_named(folder, tmp_path):
    import safetensors.torch

    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_checkpoint(folder.file(4))
    path = folder.write(make())
    path.write_bytes(safetensors.torch.save({"x": torch.ones(3)}, {"format": "pt"}))
    with pytest.raises(CheckpointError, match="is not a checkpoint of sefi_fast"):
        read_checkpoint(folder.file(4))
    path.write_bytes(safetensors.torch.save({"x": torch.ones(3)}))
    with pytest.raises(CheckpointError, match="is not a checkpoint of sefi_fast"):
        read_checkpoint(folder.file(4))
    path.write_bytes(b"\x80\x04\x95pickled" * 20)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(folder.file(4))
    metadata = {"format": "sefi_fast.checkpoint", "format_version": "2", "library_version": "9.0"}
    path.write_bytes(safetensors.torch.save({"x": torch.ones(3)}, metadata))
    with pytest.raises(CheckpointError, match=r"written by sefi_fast 9\.0 .* update"):
        read_checkpoint(folder.file(4))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "folder.safetensors")


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


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(folder, monkeypatch):
    folder.write(make(2))
    before = sorted(os.listdir(folder.path))

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write(make(4))
    assert sorted(os.listdir(folder.path)) == before
    assert read_checkpoint(folder.file(2)).step == 2


def test_a_limit_on_file_sizes_is_like_a_full_disk(folder):
    folder.write(make(2))
    before = sorted(os.listdir(folder.path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError):
            folder.write(make(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(folder.path)) == before
    assert read_checkpoint(folder.file(2)).step == 2


def test_a_file_in_the_folders_place_is_an_error(tmp_path):
    (tmp_path / "me.safetensors.checkpoints").write_text("a file")
    with pytest.raises(FileExistsError, match="is in the way"):
        CheckpointFolder(tmp_path / "me.safetensors.checkpoints").check()
    CheckpointFolder(tmp_path / "nothing").check()
    CheckpointFolder(tmp_path).check()


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
