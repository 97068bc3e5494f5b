"""Every file is written whole or not at all, and its renaming reaches the disk."""

from __future__ import annotations

import builtins
import errno
import os
import stat
from functools import partial
from pathlib import Path

import pytest
import torch

from sefi_fast import export_embedding
from sefi_fast.errors import PathError
from sefi_fast.subject import Subject
from sefi_fast.utils.files import (
    atomic_write,
    checksum,
    read_regular,
    remove_partials,
    try_atomic_write,
    user_path,
)

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
    path = tmp_path / "me.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", _failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"before"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_a_file_system_that_cannot_sync_takes_the_file(tmp_path, monkeypatch, write, code):
    monkeypatch.setattr(os, "fsync", _failing(code))
    try_atomic_write(tmp_path / "me.safetensors")
    write(tmp_path / "me.safetensors")
    assert (tmp_path / "me.safetensors").stat().st_size


def _failing(code):
    def fail(*arguments, **settings):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("place", ["me.safetensors", "there", "new/folder/me.safetensors"])
def test_a_trial_meets_what_a_save_will_meet(tmp_path, monkeypatch, place, call, code):
    (tmp_path / "there").write_bytes(b"mine")
    path = tmp_path / place
    try_atomic_write(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, _failing(code))
        with pytest.raises(OSError, match=os.strerror(code)):
            try_atomic_write(path)
    assert os.listdir(tmp_path) == ["there"] and (tmp_path / "there").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["m" * 243 + ".safetensors", "é" * 127, "猫" * 85])
@pytest.mark.parametrize("folder", ["", "new"])
def test_a_name_as_long_as_can_be_is_written(tmp_path, folder, name):
    path = tmp_path / folder / name
    assert 254 <= len(os.fsencode(name)) <= 255
    try_atomic_write(path)
    atomic_write(path, b"content")
    assert os.listdir(path.parent) == [name]
    longer = path.with_name(name + "mm")
    for write in (try_atomic_write, lambda place: atomic_write(place, b"")):
        with pytest.raises(OSError, match="too long"):
            write(longer)


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    target.write_bytes(b"before")
    link.symlink_to(target)
    try_atomic_write(link)
    assert target.read_bytes() == b"before"
    atomic_write(link, b"content")
    assert link.is_symlink() and target.read_bytes() == b"content"
    assert os.listdir(tmp_path / "far") == ["target"]


@pytest.mark.parametrize("place", ["nowhere", "nowhere/me", "nowhere/new/me", "loop", "loop/me"])
@pytest.mark.parametrize("write", [try_atomic_write, lambda path: atomic_write(path, b"")])
def test_a_link_that_leads_nowhere_is_not_written(tmp_path, place, write):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError):
        write(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["loop", "nowhere"]


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "fifo", tmp_path / "null", Path("/dev/null")):
        for write in (try_atomic_write, lambda place: atomic_write(place, b"content")):
            with pytest.raises(OSError, match="a device, a pipe or a socket"):
                write(path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_file_without_write_permission_is_replaced_and_an_immutable_one_told(
    tmp_path, monkeypatch
):
    path = tmp_path / "me"
    path.write_bytes(b"before")
    honest = os.open

    def opened(code, place, flags, *more, **settings):
        if place == path and flags & os.O_WRONLY:
            raise OSError(code, os.strerror(code))
        return honest(place, flags, *more, **settings)

    monkeypatch.setattr(os, "open", partial(opened, errno.EACCES))
    try_atomic_write(path)
    monkeypatch.setattr(os, "open", partial(opened, errno.EPERM))
    with pytest.raises(OSError, match="not permitted"):
        try_atomic_write(path)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("~/me.png", "home/me.png"),
        ("~", "home"),
        (Path("~/me.png"), "home/me.png"),
        ("a/~/me.png", "a/~/me.png"),
        ("./~draft.png", "here/~draft.png"),
        ("~draft.png", "here/~draft.png"),
        ("me.png", "me.png"),
        ("some/model", "some/model"),
    ],
)
def test_a_tilde_in_front_is_the_home_folder(tmp_path, monkeypatch, given, path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "~draft.png").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wanted = tmp_path / path if path.startswith("h") else Path(path)
    assert user_path(given) == user_path(user_path(given)) == wanted


@pytest.mark.parametrize("given", ["~nosuchuser/x", "~nosuchuser", "a\0b", "\ud800.png"])
def test_what_cannot_be_a_path_is_told(given):
    with pytest.raises(PathError, match=r"^The path .*\. (Give|Leave|Write)") as caught:
        user_path(given)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["me.safetensors", "m" * 243 + ".safetensors"])
def test_the_temporary_file_of_a_killed_process_is_removed(tmp_path, monkeypatch, name):
    path = tmp_path / name
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", _failing(errno.EIO))
        patched.setattr(Path, "unlink", lambda *arguments, **settings: None)
        with pytest.raises(OSError):
            atomic_write(path, b"half")
    assert len(os.listdir(tmp_path)) == 1
    remove_partials(tmp_path / "other")
    assert len(os.listdir(tmp_path)) == 1
    remove_partials(path)
    assert os.listdir(tmp_path) == []


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


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_write_that_fails_names_the_file_and_not_the_temporary_one(tmp_path, monkeypatch, call):
    path = tmp_path / "me.safetensors"
    module = builtins if call == "open" else os
    monkeypatch.setattr(module, call, _failing(errno.ENOSPC))
    with pytest.raises(OSError) as caught:
        atomic_write(path, b"half")
    assert str(caught.value).endswith(f": {str(path)!r}")
    assert os.listdir(tmp_path) == []
