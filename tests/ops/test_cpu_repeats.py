"""The C++ backend repeats bit for bit on any number of threads, uses little memory, and forks."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ops.oracle import Inputs, make_inputs
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sefi_fast.ops import cpu, fused_cross_attention

_C = pytest.importorskip("sefi_fast._C", reason="the native core is not built")

# Each dtype has products of its own on some processors.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def everything(inputs: Inputs) -> list[Tensor]:
    """Return every output and every gradient."""
    inputs = inputs.trainable()
    leaves = [inputs.query, inputs.key, inputs.value]
    results = fused_cross_attention(*leaves, **inputs.keywords(), backend="cpu")
    pairs = [(x, g.to(x.dtype)) for x, g in zip(results, inputs.grads, strict=True) if x.grad_fn]
    leaves += [inputs.reference_key] if inputs.reference_grad else []
    outputs, grads = zip(*pairs, strict=True)
    return [*results, *torch.autograd.grad(outputs, leaves, grads)]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broadcast", ["broadcast_kv", "broadcast_reference"])
def test_same_bits_in_repeats_on_any_number_of_threads(dtype: torch.dtype, broadcast: str) -> None:
    options = {"weights": True, "tokens": 2, broadcast: True, "reference_grad": True}
    inputs = make_inputs(2, 2, 1100, dtype=dtype, **options)
    torch.set_num_threads(1)
    first = everything(inputs)
    assert len(first) == 7
    for repeat in range(30):
        torch.set_num_threads(2 + repeat % 2)
        assert_same_bits(everything(inputs), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_from_several_threads_do_not_mix(dtype: torch.dtype) -> None:
    options = {"dtype": dtype, "tokens": 1, "reference_grad": True}
    cases = [make_inputs(1, 2, 300, seed=seed, **options) for seed in range(4)]
    wanted = [everything(case) for case in cases]
    with ThreadPoolExecutor(4) as threads:
        for index, found in enumerate(threads.map(everything, 5 * cases)):
            assert_same_bits(found, wanted[index % 4])


@pytest.mark.parametrize(
    ("queries", "head_dim", "heads", "batch"),
    [(4096, 40, 8, 1), (1024, 80, 8, 1), (256, 160, 8, 2), (1024, 64, 10, 1)],
)
def test_scratch_memory_is_at_most_a_tenth_of_that_of_plain_attention(
    queries: int, head_dim: int, heads: int, batch: int
) -> None:
    inputs = make_inputs(batch, heads, queries, 77, head_dim)
    used: list[int] = []

    class Core:
        """Records the scratch memory of each call on two threads."""

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: used.append(getattr(_C, name)(*arguments[:-1], 2))

    with mock.patch.object(cpu, "_C", Core()):
        everything(inputs)
    assert len(used) == 2
    assert 0 < max(used) <= _plain_memory(inputs) / 10


def _plain_memory(inputs: Inputs) -> int:
    """Return the peak memory of plain attention with the loss and of its autograd backward."""
    leaves = inputs.trainable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        probs, ref_probs = (
            torch.softmax(leaves.query @ key.transpose(-1, -2) * inputs.scale, -1)
            for key in (leaves.key, leaves.reference_key)
        )
        outputs = probs @ leaves.value, (probs - ref_probs).square().sum((2, 3)).mean(1)
        wanted = (leaves.query, leaves.key, leaves.value)
        grads = torch.autograd.grad(outputs, wanted, (inputs.grad_output, inputs.grad_subject_loss))
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes)) - sum(4 * tensor.numel() for tensor in (outputs[0], *grads))


# The child runs no parallel operator of PyTorch, whose own threads do not exist there.
FORKED = """
import os, sys, torch
torch.set_num_threads(2)
from sefi_fast.ops import fused_cross_attention
query = torch.randn(1, 4, 600, 40); key = torch.randn(1, 4, 77, 40)
narrow, narrow_key = query.bfloat16(), key.bfloat16()
def run():
    wide = fused_cross_attention(query, key, key, backend="cpu").output
    half = fused_cross_attention(narrow, narrow_key, narrow_key, backend="cpu").output
    return wide.numpy().tobytes(), half.view(torch.int16).numpy().tobytes()
before = run()
child = os.fork()
if child == 0:
    os._exit(0 if before == run() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


# A call without torch, and so without an OpenMP runtime.
OWN_THREADS = """
import ctypes, os, resource, signal, sys, threading
from sefi_fast import _C
assert _C.thread_source() == "own", _C.thread_source()
def prepared(n, m, d):
    floats = lambda count: (ctypes.c_float * count)(*[((7 * i) % 13) / 13 for i in range(count)])
    query, key, loss, output = floats(4 * n * d), floats(4 * m * d), floats(1), floats(4 * n * d)
    view = lambda t, rows: (ctypes.addressof(t), 1, 4 * rows * d, rows * d, d)
    k = view(key, m)
    arguments = ((1, 4, n, m, d), 0, 0.2, [view(query, n), k, k, k], [(0, 0, 0)] * 3, False,
                 view(output, n), ctypes.addressof(loss), 0)
    keep_alive = query, key, loss
    def call(threads, keep_alive=keep_alive):
        _C.forward(*arguments, threads)
        return bytes(output)
    return call
"""
ANY_NUMBER_OF_THREADS = """
call = prepared(600, 77, 40)
outputs = [call(threads) for threads in (1, 2, 3)]
assert outputs[0] == outputs[1] == outputs[2]
"""
THREADS_REFUSED = """
call = prepared(600, 77, 40)
wanted = call(1)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 6 * 2**20,) * 2)
try:
    threading.Thread(target=int).start()
except RuntimeError:
    assert call(3) == wanted
"""
# A lock that another thread holds at the time of the fork stays locked in the child.
FORKED_DURING_CALLS = """
def again():
    call = prepared(2, 2, 4)
    while True:
        call(2)
for _ in range(3):
    threading.Thread(target=again, daemon=True).start()
call = prepared(2, 2, 4)
failed = 0
for _ in range(500):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        call(2)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed = 1
        break
sys.stderr.write("a child hangs" if failed else "")
sys.stderr.flush()
os._exit(failed)
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
reads_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(FORKED, id="forked child", marks=needs_fork),
        pytest.param(OWN_THREADS + ANY_NUMBER_OF_THREADS, id="threads of its own"),
        pytest.param(OWN_THREADS + THREADS_REFUSED, id="threads refused", marks=reads_proc),
        pytest.param(OWN_THREADS + FORKED_DURING_CALLS, id="forked in calls", marks=needs_fork),
    ],
)
def test_script_in_another_process(script: str) -> None:
    folder = Path(_C.__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
