"""A kept launch passes what Triton's own launch would pass, and plans are made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sefi_fast.kernels import Device, plan_forward

from sefi_fast.ops.inputs import AttentionInputs

ROOT = Path(__file__).resolve().parents[2]

# The tests around this one run in Triton's interpreter, which is chosen when it is imported.
SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[1:]
import torch
from common.idle_driver import IdleDriver
driver = IdleDriver(80, keep=True)
driver.install()
from sefi_fast.kernels import Device, plan_backward_key_value, plan_forward
from sefi_fast.ops.inputs import AttentionInputs, OutputGrads
device = Device(80, 8, False)

def rows(length, offset=0, heads=2, width=16, batch=1):
    flat = torch.zeros(batch * length * heads * width + offset, dtype=torch.bfloat16)[offset:]
    return flat.view(batch, length, heads, width).transpose(1, 2)

def launches(kind):
    offset = 1 if kind == "unaligned" else 0
    reference = None if kind == "no reference" else rows(16)
    width = 32 if kind == "other" else 16
    # Two samples and keys of one: another kernel reduces their gradients.
    query = rows(40, offset, width=width, batch=2 if kind == "reduced" else 1)
    inputs = AttentionInputs(query, rows(16, width=width), rows(16, width=width),
                             None if reference is None else rows(16, width=width))
    forward, _ = plan_forward(inputs, torch.empty_like(query), None, 0.25, device)
    if kind != "reduced":
        return [forward]
    totals = (torch.empty(1, 16, 2, 16).bfloat16(), torch.empty(1, 16, 2, 16).bfloat16(), None)
    grads = OutputGrads(query, torch.ones(1), None)
    row_stats = torch.empty(2, 2, 40, 8)
    return plan_backward_key_value(inputs, grads, row_stats, totals, 0.25, device)[-1:]

def facts(start):
    places = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in start.arguments]
    return [start.kernel, list(start.grid), places]

found = []
kinds = ["plain", "plain", "unaligned", "no reference", "other", "unaligned", "plain"]
for kind in [*kinds, "reduced", "reduced"]:
    for launch in launches(kind):
        driver.starts.clear()
        tries = []
        jit, run = type(launch.kernel), type(launch.kernel).run
        jit.run = lambda *given, **named: tries.append(1) or run(*given, **named)
        launch.run()
        jit.run = run
        # And as Triton launches it, with all arguments by name.
        launch.kernel[launch.prepared.grid](**launch.arguments, **launch.config.options)
        ours, own = map(facts, driver.starts)
        found.append([kind, launch.kernel.fn.__name__, len(tries), ours, own])
print(json.dumps(found))
"""


def test_a_kept_launch_is_the_launch_that_triton_makes() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "benchmarks"), str(ROOT)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [kind for kind, *_ in found].count("reduced") == 2 and found[-1][1] == "_reduce_splits"
    for kind, _, _, ours, own in found:
        assert ours == own, kind
    # Triton is asked once for each kind of tensors.
    assert [tries for _, _, tries, _, _ in found] == [1, 0, 1, 1, 1, 0, 0, 1, 0]
    handles = {kind: ours[0] for kind, _, _, ours, _ in found}
    assert len(set(handles.values())) == len(handles) == 5


def test_a_layout_is_planned_once_for_each_device_and_scale() -> None:
    def rows(length: int, batch: int = 1) -> torch.Tensor:
        return torch.zeros(batch, length, 2, 16).transpose(1, 2)

    def prepared(
        batch: int = 1, scale: float = 0.25, index: int = 0, dense: bool = False
    ) -> object:
        query = rows(40, batch)
        query = query.contiguous() if dense else query
        inputs = AttentionInputs(query, rows(16), rows(16), rows(16))
        output = torch.empty(batch, 40, 2, 16)
        launch, _ = plan_forward(inputs, output, None, scale, Device(80, 2, True, index))
        return launch.prepared

    first = prepared()
    assert prepared() is first
    others = [prepared(batch=2), prepared(scale=0.5), prepared(index=1), prepared(dense=True)]
    assert len({id(first), *map(id, others)}) == 5
