"""Two processes under accelerate's launcher leave what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.shared import random_image

from sefi_fast.subject import Subject

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["--steps", "2", "--batch-size", "2", "--resolution", "32", "--batch-subjects", "2"]


def launch(command: list[str], folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [sys.executable, *command, "-m", "sefi_fast.cli", "train-many", str(folder)]
        + ["--output", str(output), "--quiet", *SETTINGS],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )


@pytest.mark.slow
def test_two_processes_write_the_same_files_as_one(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    names = [f"s{number}" for number in range(5)]
    for number, name in enumerate(names):
        random_image(number, 32, 32).save(images / f"{name}.png")
    # With --cpu accelerate starts several processes through MPI only; this is its other launcher.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        launcher += ["--main_process_port", str(listener.getsockname()[1])]
    both = launch(launcher, images, tmp_path / "two")
    assert both.returncode == 0, both.stderr[-2000:]
    # Three batches of at most two: the first and the third are the first process's.
    counts = sorted(line.split(": ")[1].split()[0] for line in both.stdout.splitlines())
    assert counts == ["2", "3"]
    alone = launch([], images, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    for name in names:
        one, two = (Subject.load(tmp_path / n / f"{name}.safetensors") for n in ("one", "two"))
        assert torch.equal(one.tokens[0], two.tokens[0])
        assert (one.settings, one.placeholder) == (two.settings, two.placeholder)
    rows = [
        [json.loads(line) for line in (tmp_path / n / "summary.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for row in rows[0] + rows[1]:
        del row["seconds"]
    assert rows[0] == rows[1] and [row["name"] for row in rows[0]] == names
