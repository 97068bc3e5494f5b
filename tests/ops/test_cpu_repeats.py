"""The C++ backend: the same bits on any number of threads, little memory, alive after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ops.oracle import make_inputs
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sefi_fast.ops import cpu, eager

_C = pytest.importorskip("sefi_fast._C", reason="the native core is not built")

# Products of another kind where the processor multiplies these types by itself.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def everything(inputs: Any) -> list[Tensor]:
    """Every output and every gradient."""
    options = inputs.options._replace(reference_grad=True, needs=(True, True, True, True))
    outputs = cpu.forward(inputs.tensors, options)
    grads = cpu.backward(inputs.grads, inputs.tensors, options)
    return [*outputs, *(grad for grad in grads if grad is not None)]


def run_apart(script: str) -> str:
    """What a script complained of in a Python of its own, which imports what these tests import."""
    folder = Path(_C.__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    return f"exit {run.returncode}: {run.stderr}" if run.returncode else ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", (2, 3))
def test_any_number_of_threads_gives_the_same_bits(threads, dtype):
    inputs = make_inputs(2, 3, 1100, 77, 40, dtype, weights=True, tokens=2, broadcast_kv=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything(inputs)
        torch.set_num_threads(threads)
        together = everything(inputs)
    finally:
        torch.set_num_threads(before)
    assert len(alone) == 7
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fifty_repeats_give_the_same_bits(dtype):
    inputs = make_inputs(2, 2, 300, 77, 40, dtype, weights=True, tokens=2, broadcast_reference=True)
    first = everything(inputs)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(inputs), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_from_several_threads_do_not_mix(dtype):
    cases = [make_inputs(1, 2, 300, 77, 40, dtype, tokens=1, seed=seed) for seed in range(4)]
    wanted = [everything(case) for case in cases]
    found: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = everything(cases[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, want in enumerate(wanted):
        assert all(torch.equal(a, b) for a, b in zip(want, found[index], strict=True))


@pytest.mark.parametrize(
    ("queries", "head_dim", "heads", "batch"),
    ((4096, 40, 8, 1), (1024, 80, 8, 1), (256, 160, 8, 2), (1024, 64, 10, 1)),
)
def test_scratch_is_a_tenth_of_the_plain_path(queries, head_dim, heads, batch):
    """On two threads, against the most that plain attention with the loss holds at one time."""
    inputs = make_inputs(batch, heads, queries, 77, head_dim)
    used: list[int] = []

    class Core:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: used.append(getattr(_C, name)(*arguments[:-1], 2))

    with mock.patch.object(cpu, "_C", Core()):
        cpu.forward(inputs.tensors, inputs.options)
        options = inputs.options._replace(needs=(True, True, True, False))
        cpu.backward(inputs.grads._replace(attn_probs=None), inputs.tensors, options)
    assert len(used) == 2
    assert 0 < max(used) <= _plain_memory(inputs) / 10


def _plain_memory(inputs: Any) -> int:
    """Most bytes alive at once in eager forward and autograd backward, without its results."""
    leaves = inputs.trainable()
    wanted = (leaves.query, leaves.key, leaves.value)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        output, subject_loss, _ = eager.forward(leaves.tensors, leaves.options)
        grads = torch.autograd.grad(
            (output, subject_loss), wanted, (inputs.grad_output, inputs.grad_subject_loss)
        )
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most - sum(4 * tensor.numel() for tensor in (output, *grads))


FORKED = """
import os, sys, torch
torch.set_num_threads(2)
from sefi_fast.ops import AttentionInputs, cpu
from sefi_fast.ops.types import Options
query = torch.randn(1, 4, 600, 40); key = torch.randn(1, 4, 77, 40)
narrow, narrow_key = query.bfloat16(), key.bfloat16()
options = Options(False, 0.2, False)
def run():  # and no operator of PyTorch's, whose own threads are gone in the child
    wide = cpu.forward(AttentionInputs(query, key, key), options)[0]
    half = cpu.forward(AttentionInputs(narrow, narrow_key, narrow_key), options)[0]
    return wide.numpy().tobytes(), half.view(torch.int16).numpy().tobytes()
before = run()
child = os.fork()
if child == 0:
    os._exit(0 if before == run() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_use_it():
    assert run_apart(FORKED) == ""


THREADS_OF_ITS_OWN = """
import ctypes, os, resource, signal, sys, threading
from sefi_fast import _C
assert _C.thread_source() == "own", _C.thread_source()
def prepared(n, m, d):
    floats = lambda count: (ctypes.c_float * count)(*[((7 * i) % 13) / 13 for i in range(count)])
    query, key, align, output = floats(4 * n * d), floats(4 * m * d), floats(1), floats(4 * n * d)
    view = lambda t, rows: (ctypes.addressof(t), 1, 4 * rows * d, rows * d, d)
    k = view(key, m)
    arguments = ((1, 4, n, m, d), 0, 0.2, [view(query, n), k, k, k], [(0, 0, 0)] * 3, False,
                 view(output, n), ctypes.addressof(align), 0)
    held = query, key, align
    def call(threads, held=held):
        _C.forward(*arguments, threads)
        return bytes(output)
    return call
"""

ANY_NUMBER = """
call = prepared(600, 77, 40)
outputs = [call(threads) for threads in (1, 2, 3)]
assert outputs[0] == outputs[1] == outputs[2]
"""


def test_without_an_openmp_run_time_it_has_threads_of_its_own():
    assert run_apart(THREADS_OF_ITS_OWN + ANY_NUMBER) == ""


NO_MORE = """
call = prepared(600, 77, 40)
wanted = call(1)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 6 * 2**20,) * 2)
try:
    threading.Thread(target=int).start()
except RuntimeError:
    assert call(3) == wanted
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_it_does_without_threads_that_the_system_refuses():
    assert run_apart(THREADS_OF_ITS_OWN + NO_MORE) == ""


# A lock that another thread holds at the fork stays locked in the child.
FORKED_AMIDST_CALLS = """
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_that_are_forked_while_others_call_do_not_hang():
    assert run_apart(THREADS_OF_ITS_OWN + FORKED_AMIDST_CALLS) == ""
