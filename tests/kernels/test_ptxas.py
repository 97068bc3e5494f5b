"""On 9.0 a ptxas that miscompiles the kernels is replaced by another, for these kernels alone."""

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
def _an_old_triton_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in (*ptxas._VARIABLES, "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(ptxas, "tritons_version", lambda capability: "12.9")
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


def test_the_first_sound_one_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = fake_ptxas(tmp_path / "old", release("13.2"))
    broken = fake_ptxas(tmp_path / "broken", "no version")
    sound = fake_ptxas(tmp_path / "sound", release("13.4"))
    newer = fake_ptxas(tmp_path / "newer", release("14.0"))
    offer(monkeypatch, tmp_path / "missing", old, broken, sound, newer)
    assert ptxas.replacement(90) == (str(sound), "13.4")
    assert ptxas.assembler_version(90) == "13.4"


def test_without_a_sound_one_triton_s_own_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, fake_ptxas(tmp_path / "old", release("13.0")))
    assert ptxas.replacement(90) is None
    assert ptxas.assembler_version(90) == "12.9"
    assert not ptxas.is_sound("12.9", 90)


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_other_devices_keep_triton_s_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int
) -> None:
    offer(monkeypatch, fake_ptxas(tmp_path / "sound", release("13.4")))
    assert ptxas.replacement(capability) is None


def test_a_sound_one_of_triton_s_own_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ptxas, "tritons_version", lambda capability: "13.3")
    offer(monkeypatch, fake_ptxas(tmp_path / "sound", release("13.4")))
    assert ptxas.replacement(90) is None


@pytest.mark.parametrize("variable", ptxas._VARIABLES)
def test_one_that_was_named_by_hand_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    offer(monkeypatch, fake_ptxas(tmp_path / "sound", release("13.4")))
    monkeypatch.setenv(variable, str(tmp_path / "mine"))
    assert ptxas.replacement(90) is None


def test_packages_and_toolkits_are_looked_through(
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


def test_triton_takes_it_inside_and_all_is_as_before_outside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sound = fake_ptxas(tmp_path / "sound", release("13.4"))
    offer(monkeypatch, sound)
    monkeypatch.setenv("PTXAS_OPTIONS", "--warn-on-spills")
    before = knobs.nvidia.ptxas.path, dict(os.environ)
    with pytest.raises(KeyError), ptxas.assembling(90) as options:
        assert knobs.nvidia.ptxas.path == knobs.nvidia.ptxas_blackwell.path == str(sound)
        assert options == {"ptx_options": f"--warn-on-spills {ptxas.OPTIONS}"}
        raise KeyError
    assert (knobs.nvidia.ptxas.path, dict(os.environ)) == before
    with ptxas.assembling(80) as options:
        assert options == {}
        assert knobs.nvidia.ptxas.path == before[0]


SCRIPT = """
import sys
import torch
from pathlib import Path
from sefi_fast.kernels import ptxas
from common.aot_compile import compile_launch, example_launches

ptxas.tritons_version = lambda capability: "12.9"
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
    if not ptxas.is_sound(version.split("release ")[1].split(",")[0], 90):
        pytest.skip("this Triton carries no sound assembler")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(wrapper)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked = log.read_text().splitlines()
    assert any("--gpu-name=sm_90a" in line and ptxas.OPTIONS in line for line in asked)
