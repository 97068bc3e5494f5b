"""Training killed with SIGKILL at random moments loses nothing: in the end the tokens are the same.

The long one, a hundred kills: pytest -m long tests/training/test_kill.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killing.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize(
    "kills", [3, pytest.param(100, marks=pytest.mark.long)], ids=["three", "a hundred"]
)
def test_runs_killed_at_random_moments_end_as_uninterrupted_ones(tmp_path, kills):
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(kills)],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=60 * 30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == kills
    if kills >= 100:
        # Kills hit all parts of a run, and runs really went on from many of its steps.
        assert len(result["resumed"]) >= 5
        assert result["stuck"] > 0
