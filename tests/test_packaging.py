"""The package installs with and without a compiler, and takes no name that is another's."""

from __future__ import annotations

import os
import re
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


@pytest.mark.parametrize(
    "code",
    [
        "import sefi_fast",
        "command('train', '--help')",
        "command('generate', 'a <it>', '--number', '0')",
        "command('evaluate', '--help')",
        "command('train', 'me.png', '--steps', '0')",
    ],
)
def test_neither_the_import_nor_help_nor_wrong_options_wait_for_pytorch(code):
    script = (
        "import sys\nfrom contextlib import suppress\nfrom sefi_fast.cli import main\n"
        "def command(*words):\n    with suppress(SystemExit):\n        assert main(words) == 1\n"
        f"{code}\nprint([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.splitlines()[-1:] == ["[]"], run.stderr


def test_info_names_versions_machine_and_backends():
    run = subprocess.run(
        [sys.executable, "-m", "sefi_fast.cli", "info"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = {line.split()[0]: line for line in run.stdout.splitlines() if line.split()}
    assert "available" in lines["eager"]
    assert {"sefi_fast", "torch", "triton", "cpu", "native"} <= lines.keys()


@pytest.mark.slow
def test_without_a_compiler_the_wheel_has_everything_else(tmp_path):
    """One line says what is missing and what that costs; the wheel works without the core."""
    source = _copy_of_the_checkout(tmp_path / "source", model=True)
    build = _build_wheel(source, tmp_path, CC="/bin/false", CXX="/bin/false")
    assert build.returncode == 0, build.stdout + build.stderr
    (said,) = _said(build)
    assert "not built" in said and "compiler" in said and "slower" in said
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert not any(name.endswith(".so") for name in names)
    assert {"sefi_fast/py.typed", "sefi_fast/kernels/__init__.py"} <= set(names)
    assert not any(name.startswith("kernels/") for name in names)
    world = ROOT / "sefi_fast" / "tiny_world"
    data = [*world.glob("model/**/*.*"), *world.glob("*.safetensors"), *world.glob("*.png")]
    assert len(data) >= 12
    assert {str(path.relative_to(ROOT).as_posix()) for path in data} <= set(names)
    # An editable installation's finder would supply the module that this wheel lacks.
    script = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)];"
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


@pytest.mark.slow
def test_a_cuda_compile_that_fails_costs_the_cuda_kernels_alone(tmp_path):
    """One line has the compiler's words; the CPU core, here a small one, is there."""
    source = _copy_of_the_checkout(tmp_path / "source", small_core=True)
    build = _build_modules(source, CUDA_HOME=str(_nvcc_that_fails(tmp_path)))
    assert build.returncode == 0, build.stdout + build.stderr
    (said,) = _said(build)
    assert "CUDA C++ kernels are not built" in said and "the sky is falling" in said
    assert [path.name[:3] for path in source.glob("sefi_fast/*.so")] == ["_C."]


@pytest.mark.slow
def test_cuda_kernels_that_are_demanded_or_unwanted(tmp_path):
    """SEFI_CUDA=1 and bad settings end the build at once with one sentence, 0 leaves them out."""
    source = _copy_of_the_checkout(tmp_path / "source", small_core=True)
    nvcc = str(_nvcc_that_fails(tmp_path))
    for variables, sentence in (
        ({"SEFI_CUDA": "1", "CUDA_HOME": str(tmp_path)}, "SEFI_CUDA is 1.*compiler was not found"),
        ({"SEFI_CUDA": "yes", "CUDA_HOME": nvcc}, "SEFI_CUDA is 'yes'. Set it to 1"),
        ({"SEFI_CUDA_ARCHS": "70", "CUDA_HOME": nvcc}, "SEFI_CUDA_ARCHS names '70'.*80, 90;"),
    ):
        build = _build_modules(source, **variables)
        assert build.returncode != 0
        assert re.search(sentence, build.stderr), build.stderr
        assert not list(source.glob("sefi_fast/*.so"))
    build = _build_modules(source, SEFI_CUDA="0", CUDA_HOME=nvcc)
    assert build.returncode == 0 and not _said(build), build.stderr
    assert [path.name[:3] for path in source.glob("sefi_fast/*.so")] == ["_C."]


def test_every_source_of_the_native_modules_is_in_the_manifest():
    """What the builds read is what a source distribution carries."""
    manifest = (ROOT / "MANIFEST.in").read_text()
    endings = {path.suffix for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    (line,) = [line for line in manifest.splitlines() if line.startswith("recursive-include csrc ")]
    assert {f"*{ending}" for ending in endings} <= set(line.split())
    assert "native_build.py" in manifest


def _said(build: subprocess.CompletedProcess[str]) -> list[str]:
    """What the build told of native modules that are not there."""
    lines = (build.stdout + build.stderr).splitlines()
    return [line for line in lines if line.strip().startswith("sefi_fast: ")]


def _build_wheel(source: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v"),
            *("--no-index", "-w", str(folder), str(source)),
        ],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def _build_modules(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    environment = {name: value for name, value in os.environ.items() if "CUDA" not in name}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=source, env={**environment, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def _nvcc_that_fails(folder: Path) -> Path:
    """A CUDA_HOME whose compiler knows its version and architectures, and compiles nothing."""
    home = folder / "toolkit"
    (home / "bin").mkdir(parents=True)
    program = home / "bin" / "nvcc"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;\n"
        "--list-gpu-code) echo sm_80; echo sm_90;;\n"
        "*) echo 'kernel.cu(1): error: the sky is falling' >&2; exit 2;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    return home


SMALL_CORE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, module) { module.doc() = "Small."; }
"""


def _copy_of_the_checkout(target: Path, *, small_core: bool = False, model: bool = False) -> Path:
    """What a build reads, without the build products that a checkout may hold.

    small_core: with a CPU module of one line, which compiles in a second. model: with the bundled
    model's 19 MB.
    """
    import shutil

    left_out = ("*.so", "__pycache__", "build", "*.egg-info", *(() if model else ("model",)))
    ignore = shutil.ignore_patterns(*left_out)
    target.mkdir()
    for name in ("sefi_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "native_build.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, target / name)
    if small_core:
        shutil.rmtree(target / "csrc" / "cpu")
        (target / "csrc" / "bindings.cpp").write_text(SMALL_CORE)
    return target
