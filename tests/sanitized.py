"""Build the native core with AddressSanitizer and run pytest on it.

    python tests/sanitized.py tests/ops/test_direct_calls.py

The installed core stays as it is. Needs GCC.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-fsanitize=address -fno-omit-frame-pointer -g -O1"


def build(folder: Path) -> Path:
    """Compile sefi_fast._C with the sanitizer into the folder."""
    sys.path.insert(0, str(ROOT))
    os.environ["CXXFLAGS"] = os.environ["LDFLAGS"] = FLAGS
    import native_build

    # Names of functions in what the sanitizer says.
    native_build.LINK_FLAGS.remove("-Wl,-s")
    target = folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    failed = native_build.build(folder, {native_build.CPU: target}, verbose=False)
    if failed:
        raise SystemExit(f"the native core does not compile: {failed[native_build.CPU]}")
    return target


def _library(name: str) -> str:
    return subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()


def run(core: Path, arguments: list[str]) -> int:
    """Run pytest on that core in this process."""
    import pytest

    spec = importlib.util.spec_from_file_location("sefi_fast._C", core)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["sefi_fast._C"] = module
    # What the sanitizer says is written past Python.
    return int(pytest.main(["-n", "0", "-q", "--capture=sys", *arguments]))


def main(arguments: list[str]) -> int:
    """Exit status of pytest, or of the sanitizer where it finds something."""
    if "SEFI_SANITIZED_CORE" in os.environ:
        return run(Path(os.environ["SEFI_SANITIZED_CORE"]), arguments)
    with tempfile.TemporaryDirectory() as folder:
        core = build(Path(folder))
        environment = os.environ | {
            "SEFI_SANITIZED_CORE": str(core),
            # The sanitizer looks for the functions that throw when it is loaded.
            "LD_PRELOAD": f"{_library('libasan.so')} {_library('libstdc++.so.6')}",
            # Python frees little at its end.
            "ASAN_OPTIONS": "detect_leaks=0",
        }
        command = [sys.executable, __file__, *(arguments or ["tests/ops"])]
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
