"""keep_freed_memory, in separate processes because it cannot be undone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from sefi_fast.utils import malloc

_LOOP = """
import resource, sys, torch
import sefi_fast
print(sefi_fast.keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range(50):  # the heap grows to its final size
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str) -> tuple[str, int]:
    """Return what the call returned, and the page faults of ten tensors of 40 MB after it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _LOOP, how], env=clean, capture_output=True, text=True, check=True
    )
    returned, faults = done.stdout.split()
    return returned, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_large_tensors_get_no_new_pages():
    # Pages may be 4 kB or larger; without the setting every tensor gets new ones.
    _, without = run("leave")
    returned, faults = run("keep")
    assert returned == "True"
    assert faults < without / 10


@pytest.mark.parametrize(
    ("library", "variables"),
    [
        ("musl", {}),
        ("glibc", {"MALLOC_TRIM_THRESHOLD_": "131072"}),
        ("glibc", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}),
    ],
)
def test_other_libraries_and_settings_of_the_user_are_left_alone(monkeypatch, library, variables):
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert malloc.keep_freed_memory() is False


@pytest.mark.parametrize("most", [0, 2**25, 2**30])
def test_the_largest_threshold_that_glibc_takes_is_set(monkeypatch, most):
    made = {}

    class Library:
        def __init__(self, name):
            pass

        def mallopt(self, option, value):
            made[option] = value
            return int(option != malloc._MMAP_THRESHOLD or value <= most)

    monkeypatch.setattr(malloc.ctypes, "CDLL", Library)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", ""))
    monkeypatch.setattr(os, "environ", {})
    assert malloc.keep_freed_memory() == bool(most)
    assert made[malloc._MMAP_THRESHOLD] == (most or 2**25)
