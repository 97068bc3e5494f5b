"""Files are written whole or not at all and reach the disk; regular files alone are read."""

from __future__ import annotations

import builtins
import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from sefi_fast import export_embedding
from sefi_fast.errors import PathError
from sefi_fast.subject import Subject
from sefi_fast.utils.files import (
    atomic_write,
    check_folder,
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
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
write_or_try = pytest.mark.parametrize(
    "write", [try_atomic_write, lambda path: atomic_write(path, b"")], ids=["try", "write"]
)


def failing(code):
    def fail(*arguments, **settings):
        raise OSError(code, os.strerror(code))

    return fail


@every_writer
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


@every_writer
def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch, write):
    path = tmp_path / "me.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"before"


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_write_that_fails_names_the_file_and_not_the_temporary_one(tmp_path, monkeypatch, call):
    path = tmp_path / "me.safetensors"
    monkeypatch.setattr(builtins if call == "open" else os, call, failing(errno.ENOSPC))
    with pytest.raises(OSError) as caught:
        atomic_write(path, b"half")
    assert str(caught.value).endswith(f": {str(path)!r}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_takes_the_file(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", failing(code))
    path = tmp_path / "me.safetensors"
    try_atomic_write(path)
    atomic_write(path, b"content")
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("place", ["me.safetensors", "there", "new/folder/me.safetensors"])
def test_a_trial_fails_as_a_save_would(tmp_path, monkeypatch, place, call):
    (tmp_path / "there").write_bytes(b"mine")
    path = tmp_path / place
    try_atomic_write(path)
    for code in (errno.EPERM, errno.EXDEV, errno.EIO, errno.ENOSPC):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, failing(code))
            with pytest.raises(OSError, match=os.strerror(code)):
                try_atomic_write(path)
    assert os.listdir(tmp_path) == ["there"] and (tmp_path / "there").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["m" * 243 + ".safetensors", "é" * 127, "猫" * 85])
@pytest.mark.parametrize("folder", ["", "new"])
def test_a_name_of_maximal_length_is_written(tmp_path, folder, name):
    path = tmp_path / folder / name
    assert 254 <= len(os.fsencode(name)) <= 255
    try_atomic_write(path)
    atomic_write(path, b"content")
    assert os.listdir(path.parent) == [name]
    for write in (try_atomic_write, lambda place: atomic_write(place, b"")):
        with pytest.raises(OSError, match="too long"):
            write(path.with_name(name + "mm"))


def test_the_target_of_a_link_is_written(tmp_path):
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
@write_or_try
def test_a_dangling_link_is_not_written(tmp_path, place, write):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError):
        write(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["loop", "nowhere"]


@write_or_try
def test_only_regular_files_are_replaced(tmp_path, write):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "fifo", tmp_path / "null", Path("/dev/null")):
        with pytest.raises(OSError, match="a device, a pipe or a socket"):
            write(path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_a_file_without_write_permission_is_replaced_and_an_immutable_one_is_not(
    tmp_path, monkeypatch, code
):
    path = tmp_path / "me"
    path.write_bytes(b"before")
    honest = os.open

    def opened(place, flags, *more, **settings):
        if place == path and flags & os.O_WRONLY:
            raise OSError(code, os.strerror(code))
        return honest(place, flags, *more, **settings)

    monkeypatch.setattr(os, "open", opened)
    if code == errno.EACCES:
        try_atomic_write(path)
    else:
        with pytest.raises(OSError, match="not permitted"):
            try_atomic_write(path)


@pytest.mark.parametrize("name", ["me.safetensors", "m" * 243 + ".safetensors"])
def test_temporary_files_of_killed_processes_are_removed_and_no_others(tmp_path, monkeypatch, name):
    path = tmp_path / name
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing(errno.EIO))
        patched.setattr(Path, "unlink", lambda *arguments, **settings: None)
        with pytest.raises(OSError):
            atomic_write(path, b"half")
    assert len(os.listdir(tmp_path)) == 1
    kept = {"me.safetensors", ".me.safetensors.x", ".other.safetensors.0123abcd"}
    for other in kept:
        (tmp_path / other).write_bytes(b"")
    remove_partials(path)
    assert set(os.listdir(tmp_path)) == kept


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_is_created_only_if_asked(tmp_path, make):
    folder = tmp_path / "new" / "folder"
    assert check_folder(folder, make=make) == folder
    assert folder.is_dir() == folder.parent.exists() == make
    assert not make or list(folder.iterdir()) == []


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
def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch, given, path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "~draft.png").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wanted = tmp_path / path if path.startswith("h") else Path(path)
    assert user_path(given) == user_path(user_path(given)) == wanted


@pytest.mark.parametrize("given", ["~nosuchuser/x", "~nosuchuser", "a\0b", "\ud800.png"])
def test_text_that_cannot_be_a_path_is_refused(given):
    with pytest.raises(PathError, match=r"^The path .*\. (Give|Leave|Write)") as caught:
        user_path(given)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("read", [read_regular, checksum])
def test_only_regular_files_up_to_the_limit_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    names = ["", "fifo", "loop", "device", "none"]
    for path in [*(tmp_path / name for name in names), "/dev/zero", "a\0b"]:
        with pytest.raises(OSError):
            read(path, 10)
    (tmp_path / "small").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("small")
    assert read(tmp_path / "link", 10) in (b"0123456789", "a684c7c6")
    with open(tmp_path / "large", "wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(OSError, match="1,099,511,627,776 bytes, and at most 10"):
        read(tmp_path / "large", 10)
