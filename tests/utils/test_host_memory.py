"""keep_freed_memory, each time in a process of its own, since it cannot be taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_LOOP = """
import resource, sys, torch
import sefi_fast
print(sefi_fast.keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range(50):  # the heap grows to where it suffices
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc's malloc")


def run(how: str, **variables: str) -> tuple[str, int]:
    """What the call returned, and the page faults of ten tensors of 40 MB after it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _LOOP, how],
        env=clean | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    returned, faults = done.stdout.split()
    return returned, int(faults)


@glibc
def test_large_tensors_come_without_new_pages():
    # Pages may be 4 kB or larger; without the setting every tensor has new ones.
    _, without = run("leave")
    returned, faults = run("keep")
    assert returned == "True"
    assert faults < without / 10


@glibc
def test_what_the_user_set_stays():
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_other_libraries_are_left_alone(monkeypatch):
    from sefi_fast.utils.malloc import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", ""))
    assert keep_freed_memory() is False
