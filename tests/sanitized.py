"""Build the native core with AddressSanitizer and run pytest with it.

    python tests/sanitized.py tests/ops/test_direct_calls.py

The installed core does not change. Needs GCC.
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

    # Reports of the sanitizer need the symbols.
    native_build.LINK_FLAGS.remove("-Wl,-s")
    target = folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    failed = native_build.build(folder, {native_build.CPU: target}, verbose=False)
    if failed:
        raise SystemExit(f"the native core does not compile: {failed[native_build.CPU]}")
    return target


def run(core: Path, arguments: list[str]) -> int:
    """Run pytest with this core in this process."""
    import pytest

    spec = importlib.util.spec_from_file_location("sefi_fast._C", core)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["sefi_fast._C"] = module
    # The sanitizer does not write through Python, so pytest must not capture file descriptors.
    return int(pytest.main(["-n", "0", "-q", "--capture=sys", *arguments]))


def main(arguments: list[str]) -> int:
    """Return the exit status of pytest, or of the sanitizer if it reports an error."""
    if "SEFI_SANITIZED_CORE" in os.environ:
        return run(Path(os.environ["SEFI_SANITIZED_CORE"]), arguments)
    # The sanitizer must be loaded first, and looks for the functions that throw when it is.
    libraries = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "SEFI_SANITIZED_CORE": str(build(Path(folder))),
            "LD_PRELOAD": " ".join(libraries),
            # Python frees little memory when it exits.
            "ASAN_OPTIONS": "detect_leaks=0",
        }
        command = [sys.executable, __file__, *(arguments or ["tests/ops"])]
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
