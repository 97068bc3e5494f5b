"""On 9.0 a ptxas that miscompiles the kernels is replaced, for these kernels alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

from sefi_fast.kernels import ptxas
from triton import knobs

# A shell script stands in for an assembler.
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a script with a first line of its own")


@pytest.fixture(autouse=True)
def _old_ptxas_of_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in (*ptxas._VARIABLES, "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(ptxas, "triton_ptxas_version", lambda capability: "12.9")
    monkeypatch.setattr(ptxas, "_candidates", lambda: iter([]))
    ptxas.replacement.cache_clear()
    yield
    ptxas.replacement.cache_clear()


def fake_ptxas(folder: Path, says: str) -> Path:
    folder.mkdir(parents=True)
    path = folder / "ptxas"
    path.write_text(f'#!/bin/sh\necho "{says}"\n')
    path.chmod(0o755)
    return path


def release(version: str) -> str:
    return f"Cuda compilation tools, release {version}, V{version}.59"


def offer(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    monkeypatch.setattr(ptxas, "_candidates", lambda: iter(paths))


def test_the_first_fixed_one_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = fake_ptxas(tmp_path / "old", release("13.2"))
    broken = fake_ptxas(tmp_path / "broken", "no version")
    fixed = fake_ptxas(tmp_path / "fixed", release("13.4"))
    newer = fake_ptxas(tmp_path / "newer", release("14.0"))
    offer(monkeypatch, tmp_path / "missing", old, broken, fixed, newer)
    assert ptxas.replacement(90) == (str(fixed), "13.4")
    assert ptxas.ptxas_version(90) == "13.4"
    assert ptxas.not_supported_reason(90) is None
    # Other devices keep Triton's own, and so does one that is fixed or was named by hand.
    assert all(ptxas.replacement(capability) is None for capability in (80, 89, 100, 120))
    ptxas.replacement.cache_clear()
    with monkeypatch.context() as change:
        change.setattr(ptxas, "triton_ptxas_version", lambda capability: "13.3")
        assert ptxas.replacement(90) is None
    for variable in ptxas._VARIABLES:
        ptxas.replacement.cache_clear()
        with monkeypatch.context() as change:
            change.setenv(variable, str(tmp_path / "mine"))
            assert ptxas.replacement(90) is None


@pytest.mark.parametrize(
    ("capability", "version", "refused"),
    [
        (90, "12.8", True),
        (90, "13.0", True),
        (90, "13.3", False),
        (90, "14.0", False),
        (80, "12.8", False),
        (100, "12.9", False),
    ],
)
def test_a_ptxas_that_miscompiles_for_hopper_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, version: str, refused: bool
) -> None:
    offer(monkeypatch, fake_ptxas(tmp_path / "old", release("13.2")))
    monkeypatch.setattr(ptxas, "triton_ptxas_version", lambda capability: version)
    assert ptxas.ptxas_version(capability) == version
    reason = ptxas.not_supported_reason(capability)
    assert (reason is not None) == refused
    if reason is not None:
        for part in (f"ptxas {version}", "triton 3.9", "TRITON_PTXAS_PATH", "nvidia-cuda-nvcc"):
            assert part in reason


def test_packages_and_toolkits_are_searched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    packaged = fake_ptxas(tmp_path / "site" / "nvidia" / "cu13" / "bin", release("13.4"))
    toolkit = fake_ptxas(tmp_path / "toolkit" / "bin", release("13.3"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    found = list(ptxas._candidates())
    assert found.index(packaged) < found.index(toolkit)


def test_triton_uses_it_inside_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fixed = fake_ptxas(tmp_path / "fixed", release("13.4"))
    offer(monkeypatch, fixed)
    monkeypatch.setenv("PTXAS_OPTIONS", "--warn-on-spills")
    before = knobs.nvidia.ptxas.path, dict(os.environ)
    with pytest.raises(KeyError), ptxas.fixed_ptxas(90) as options:
        assert knobs.nvidia.ptxas.path == knobs.nvidia.ptxas_blackwell.path == str(fixed)
        assert options == {"ptx_options": f"--warn-on-spills {ptxas.OPTIONS}"}
        raise KeyError
    assert (knobs.nvidia.ptxas.path, dict(os.environ)) == before
    with ptxas.fixed_ptxas(80) as options:
        assert options == {}
        assert knobs.nvidia.ptxas.path == before[0]


SCRIPT = """
import sys
import torch
from pathlib import Path
from sefi_fast.kernels import ptxas
from common.aot_compile import compile_launch, example_launches

ptxas.triton_ptxas_version = lambda capability: "12.9"
ptxas._candidates = lambda: iter([Path(sys.argv[1])])
compile_launch(example_launches(90, torch.bfloat16, 64, 64)["forward"], 90)
"""


def test_the_kernels_are_assembled_by_it(tmp_path: Path) -> None:
    from triton.backends.nvidia.compiler import get_ptxas

    log = tmp_path / "log"
    wrapper = fake_ptxas(tmp_path / "bin", "")
    real = get_ptxas(90).path
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {real} "$@"\n')
    places = {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "benchmarks")}
    environment = {**os.environ, **places, "TRITON_INTERPRET": "0"}
    version = subprocess.run([real, "--version"], capture_output=True, text=True, check=True).stdout
    if not ptxas.is_fixed(version.split("release ")[1].split(",")[0], 90):
        pytest.skip("this Triton carries no fixed ptxas")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(wrapper)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked = log.read_text().splitlines()
    assert any("--gpu-name=sm_90a" in line and ptxas.OPTIONS in line for line in asked)
