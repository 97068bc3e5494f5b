"""The package installs with and without a compiler, and takes no name that is another's."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
from diffusers.utils import import_utils as diffusers_utils
from transformers.utils import import_utils as transformers_utils
print(diffusers_utils.is_kernels_available(), transformers_utils.is_kernels_available())
"""


def _kernels_package_is_absent() -> bool:
    from importlib import metadata

    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return True
    return False


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="needs a source checkout")
@pytest.mark.skipif(not _kernels_package_is_absent(), reason="the Hub's kernels package is there")
def test_the_kernels_folder_is_not_taken_for_the_hub_package():
    """From the checkout's root, `import kernels` would find our folder; their checks must not."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["False", "False"], run.stderr


def test_importing_the_package_is_light():
    script = "import sys, sefi_fast; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_info_names_versions_machine_and_backends():
    run = subprocess.run(
        [sys.executable, "-m", "sefi_fast.info"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = {line.split()[0]: line for line in run.stdout.splitlines() if line.split()}
    assert "available" in lines["eager"]
    assert {"sefi_fast", "torch", "triton", "cpu", "native"} <= lines.keys()


@pytest.mark.slow
def test_without_a_compiler_the_wheel_has_everything_else(tmp_path):
    """One line says what is missing and what that costs; the wheel works without the core."""
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    source = _copy_of_the_checkout(tmp_path / "source")
    build = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v"),
            *("--no-index", "-w", str(tmp_path), str(source)),
        ],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    said = [line for line in (build.stdout + build.stderr).splitlines() if "not built" in line]
    assert len(said) == 1 and "compiler" in said[0] and "slower" in said[0]
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert not any("_C." in name and name.endswith(".so") for name in names)
    assert {"sefi_fast/py.typed", "sefi_fast/kernels/__init__.py"} <= set(names)
    assert not any(name.startswith("kernels/") for name in names)
    script = (
        "import sefi_fast, sefi_fast.kernels; print(sefi_fast.available_backends()['cpu'],"
        " sefi_fast.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=installed, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "native core sefi_fast._C is not there" in run.stdout, run.stderr
    assert str(installed) in run.stdout


def _copy_of_the_checkout(target: Path) -> Path:
    """What a build reads, without the build products that a checkout may hold."""
    import shutil

    ignore = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info", "model")
    target.mkdir()
    for name in ("sefi_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "CHANGELOG.md"):
        shutil.copy(ROOT / name, target / name)
    return target
