"""Every file is written whole or not at all, and its renaming reaches the disk."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import torch

from sefi_fast import export_embedding
from sefi_fast.subject import Subject
from sefi_fast.utils.files import atomic_write, checksum, read_regular, remove_partials

SUBJECT = Subject("<me>", "cat", [torch.ones(1, 1, 4)], [torch.ones(4)], base_model="none")
WRITERS = {
    "atomic_write": lambda path: atomic_write(path, b"content"),
    "a subject": lambda path: SUBJECT.save(path),
    "an embedding": lambda path: export_embedding(SUBJECT, path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_the_file_and_then_its_folder_reach_the_disk(tmp_path, monkeypatch, write):
    synced, honest = [], os.fsync

    def fsync(handle):
        synced.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        honest(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "new" / "me.safetensors"
    write(path)
    assert synced == ["file", "folder"]
    assert os.listdir(path.parent) == [path.name] and path.stat().st_size


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_a_full_disk_leaves_what_lay_there(tmp_path, monkeypatch, write):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "me.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"before"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "me.safetensors"
    kept = {path.name, ".me.safetensors.x", ".other.safetensors.0123abcd"}
    for name in {*kept, ".me.safetensors.0123abcd"}:
        (tmp_path / name).write_bytes(b"")
    remove_partials(path)
    assert set(os.listdir(tmp_path)) == kept


def _not_a_file(folder):
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "to-device").symlink_to("/dev/zero")
    return [folder, folder / "fifo", folder / "loop", folder / "to-device", folder / "none"]


@pytest.mark.parametrize(
    "read", [lambda path: read_regular(path, 10), lambda path: checksum(path, 10)]
)
def test_only_regular_files_up_to_the_limit_are_read(tmp_path, read):
    for path in [*_not_a_file(tmp_path), "/dev/zero", "a\0b"]:
        with pytest.raises(OSError):
            read(path)
    (tmp_path / "small").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("small")
    assert read(tmp_path / "link") in (b"0123456789", "a684c7c6")
    with open(tmp_path / "large", "wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(OSError, match="1,099,511,627,776 bytes, and at most 10"):
        read(tmp_path / "large")
