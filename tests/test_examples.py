"""The scripts in examples/ run from the command line, with few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sefi_fast

FOLDER = Path(__file__).resolve().parent.parent / "examples"
IMAGE = str(sefi_fast.bundled_subject_image())

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs a source checkout")


def run(folder: Path, script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_example_is_tested():
    tested = {"cross_attention", "processor", "train_one", "train_many", "two_subjects"}
    assert {path.stem for path in FOLDER.glob("*.py")} == tested


def test_the_operator_lowers_its_subject_loss(tmp_path):
    lines = run(tmp_path, "cross_attention.py").splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert losses[-1] < losses[0] / 2


def test_the_processor_changes_nothing_until_values_come_from_another_prompt(tmp_path):
    same, mixed = (float(line.split()[-1]) for line in run(tmp_path, "processor.py").splitlines())
    assert same < 1e-4 < mixed


def test_one_subject(tmp_path):
    run(tmp_path, "train_one.py", IMAGE, "2")
    assert {path.name for path in tmp_path.iterdir()} >= {"subject.safetensors", "subject-1.png"}


def test_many_subjects_then_two_in_one_image(tmp_path):
    lines = run(tmp_path, "train_many.py", "2").splitlines()
    assert [line.split()[0] for line in lines] == ["ada", "bo", "cy"]
    run(tmp_path, "two_subjects.py", "subjects/ada.safetensors", "subjects/bo.safetensors")
    assert (tmp_path / "two.png").exists()
