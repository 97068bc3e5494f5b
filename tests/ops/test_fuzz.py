"""Random calls of every backend that runs here, held to float64.

The default suite tries a few dozen calls a backend; the full count of 2,000 a backend is

    pytest tests/ops/test_fuzz.py -m long
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ops.cases import Case, cases
from ops.oracle import (
    BACKENDS,
    GRADIENTS,
    GRADIENTS_OF,
    OUTPUTS,
    Inputs,
    Results,
    backend_results,
    check_results,
    device_of,
    make_inputs,
    reference64,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sefi_fast.ops.dispatch import load

try:
    from sefi_fast import _C
except ImportError:
    _C = None

FULL = 2000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest errors of many calls spread further than one call's: twice the factor of the other tests.
FACTOR = 4.0

# The interpreter is a thousand times slower than compiled code.
CALLS = {name: 6 if name == "triton" and DEVICE == "cpu" else 60 for name in BACKENDS}
SETS = _C.instruction_sets() if _C is not None else [""]


@contextlib.contextmanager
def _forced(instruction_set: str) -> Iterator[None]:
    if not instruction_set:
        yield
        return
    before = _C.instruction_set()
    _C.set_instruction_set(instruction_set)
    try:
        yield
    finally:
        _C.set_instruction_set(before)


def _fuzz(backend: str, count: int, largest: int, check: Callable[[Case], None], **kinds) -> None:
    """`check` on `count` random calls, each with one of the CPU core's instruction sets."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Explaining a failure would take hundreds of calls more.
        phases=[Phase.generate, Phase.shrink],
    )
    @given(cases(largest=largest, **kinds), st.sampled_from(SETS if backend == "cpu" else [""]))
    def run(case: Case, instruction_set: str) -> None:
        with _forced(instruction_set):
            check(case)

    run()


def _check(found: Results, inputs: Inputs) -> None:
    """The accuracy rule with what random calls need beside it, worked out for each call.

    The eager path may hit zero by luck where terms cancel.
    """
    truth, share = reference64(inputs), _of_large_scores(inputs)

    def beside(tensors: Mapping[str, Tensor | None]) -> dict[str, float]:
        present = {name: x for name, x in tensors.items() if x is not None and x.numel()}
        return {name: share * x.abs().max().item() for name, x in present.items()}

    allowed = {"outputs": beside(truth.outputs)}
    allowed["outputs"]["subject_loss"] = allowed["outputs"].get("subject_loss", 0.0) + _squared(
        inputs
    )
    for which in GRADIENTS_OF:
        allowed[which] = beside(truth.gradients[which])
        for name, cancelled in _cancelled(inputs, which).items():
            allowed[which][name] = allowed[which].get(name, 0.0) + cancelled
    check_results(found, inputs, factor=FACTOR, beside=allowed)


def _squared(inputs: Inputs) -> float:
    """What rounded probabilities leave where both maps are equal: a unit of float32 in each."""
    weight = 1.0 if inputs.token_weights is None else inputs.token_weights.abs().max().item()
    rows, keys = inputs.query.shape[2], inputs.key.shape[2]
    return weight * rows * keys * torch.finfo(torch.float32).eps ** 2


def _cancelled(inputs: Inputs, which: str) -> dict[str, float]:
    """What rounding each dA and its mean leaves in the gradients where equation 8 takes them apart.

    Sixteen units of float32 in every dA − rowsum(A ∘ dA), carried on to the gradients, and what
    large scores leave: two kernels that add up a score in another order have other probabilities.
    """
    wide = inputs.double()
    largest = 0.0
    if which in ("output", "all"):
        largest += (wide.grad_output @ wide.value.transpose(2, 3)).abs().max().item()
    if which in ("subject_loss", "all") and wide.reference_key is not None:
        weight = 1.0 if wide.token_weights is None else wide.token_weights.abs().max().item()
        maps = [_probabilities(wide, key) for key in (wide.key, wide.reference_key)]
        sharpest = max(probabilities.max().item() for probabilities in maps)
        pull = 2 * weight * wide.grad_subject_loss.abs().max().item() / wide.query.shape[1]
        largest += pull * sharpest
    if which in ("attn_probs", "all") and wide.grad_attn_probs.numel():
        largest += wide.grad_attn_probs.abs().max().item()
    share = 16 * torch.finfo(torch.float32).eps + _of_large_scores(inputs)
    unit = share * abs(wide.scale) * largest
    streams = [x for x in (wide.key, wide.reference_key) if x is not None]
    # Errors of unlike rows add up like a random walk, those of one row repeated all the way.
    alike = inputs.query.stride(2) == 0
    count = wide.query.shape[2] ** (1.0 if alike else 0.5)
    rows = unit * wide.query.abs().max().item() * count
    return {
        "grad_query": unit * max(x.abs().max().item() for x in streams),
        "grad_key": rows,
        "grad_reference_key": rows,
    }


def _hold_to_float64(backend: str, count: int, largest: int, device: str | None = None) -> None:
    def check(case: Case) -> None:
        inputs = case.inputs(device or device_of(backend))
        _check(backend_results(backend, inputs), inputs)

    _fuzz(backend, count, largest, check)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_few_random_calls(backend: str) -> None:
    _hold_to_float64(backend, CALLS[backend], 80 if CALLS[backend] < 10 else 256)


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_thousands_of_random_calls(backend: str) -> None:
    _hold_to_float64(backend, FULL, 256)


def test_a_few_random_calls_of_the_emulated_cuda_kernels(emulated_cuda: ModuleType) -> None:
    _hold_to_float64("cuda", 20, 80, device="cpu")


@pytest.mark.long
def test_thousands_of_random_calls_of_the_emulated_cuda_kernels(
    emulated_cuda: ModuleType,
) -> None:
    _hold_to_float64("cuda", FULL, 128, device="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_streams_have_no_loss_and_no_gradient_of_it(backend: str) -> None:
    def check(case: Case) -> None:
        inputs = case.inputs(device_of(backend))
        assert inputs.reference_key is not None
        inputs = dataclasses.replace(inputs, key=inputs.reference_key)
        found = backend_results(backend, inputs)
        assert not found.outputs["subject_loss"].any()
        for name, gradient in found.gradients["subject_loss"].items():
            assert gradient is None or not gradient.any(), name

    _fuzz(backend, CALLS[backend], 80, check, numbers=("identical",))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_the_keys_does_not_matter(backend: str) -> None:
    def check(case: Case) -> None:
        inputs = case.inputs(device_of(backend))
        keys = inputs.key.shape[2]
        generator = torch.Generator().manual_seed(case.options["seed"])
        order = torch.randperm(keys, generator=generator).to(inputs.key.device)
        found = backend_results(backend, _reordered(inputs, order))
        back = order.argsort()
        for gradients in found.gradients.values():
            for name in ("grad_key", "grad_value", "grad_reference_key"):
                gradient = gradients[name]
                if gradient is not None:
                    # Laid out as the operator promises it again after the indexing.
                    rows = gradient.transpose(1, 2)[:, back].contiguous()
                    gradients[name] = rows.transpose(1, 2)
        _check(found, inputs)

    _fuzz(backend, CALLS[backend] // 2, 80, check)


def _probabilities(inputs: Inputs, key: Tensor) -> Tensor:
    return ((inputs.query @ key.transpose(2, 3)) * inputs.scale).softmax(-1)


def _of_large_scores(inputs: Inputs) -> float:
    """The share by which rounding the scores changes a probability: exp(x) errs as much as x."""
    wide = inputs.double()
    streams = [key for key in (wide.key, wide.reference_key) if key is not None]
    scores = [(wide.query @ key.transpose(2, 3)).abs().max().item() for key in streams]
    return 4 * torch.finfo(torch.float32).eps * max(scores) * abs(wide.scale)


def _reordered(inputs: Inputs, order: Tensor) -> Inputs:
    """The same call with its keys in another order."""

    def move(tensor: Tensor | None, axis: int) -> Tensor | None:
        return None if tensor is None else tensor.index_select(axis, order)

    tokens = inputs.probs_positions
    if tokens is not None:
        back = order.argsort()
        tokens = torch.where(tokens < 0, tokens, back[tokens.clamp_min(0)])
    moved = {name: move(getattr(inputs, name), 2) for name in ("key", "value", "reference_key")}
    rows = {name: move(getattr(inputs, name), 1) for name in ("token_weights", "key_mask")}
    return dataclasses.replace(inputs, **moved, **rows, probs_positions=tokens)


@pytest.mark.parametrize("name", [*OUTPUTS, *GRADIENTS])
def test_a_result_wrong_by_a_hundredth_is_caught(name: str) -> None:
    """What is allowed for rounding must not let a mistake through."""
    inputs = make_inputs(weights=True, tokens=2, reference_grad=True, seed=len(name))
    found = backend_results("eager", inputs)
    _check(found, inputs)
    wrong = found.outputs[name] if name in OUTPUTS else found.gradients["subject_loss"][name]
    if name == "grad_value":
        wrong = found.gradients["output"][name]
    assert wrong is not None
    wrong *= 1.01
    with pytest.raises(AssertionError, match=name):
        _check(found, inputs)


class _Allocated(TorchDispatchMode):
    """The memory of every tensor that operations make, once each and held until the end.

    What an operation writes into is not its own: Triton's interpreter copies all arguments so.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and not func._schema.is_mutable:
                storage = tensor.untyped_storage()
                self._made[storage.data_ptr()] = storage
        return made

    def bytes_beside(self, *tensors: Tensor | None) -> int:
        """All but the memory of these."""
        given = {x.untyped_storage().data_ptr() for x in tensors if x is not None}
        return sum(s.nbytes() for place, s in self._made.items() if place not in given)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
@pytest.mark.parametrize("grown", ["queries", "keys"])
def test_extra_memory_does_not_grow_with_the_map(backend: str, grown: str) -> None:
    """Beside its results a call may keep rows and keys, and never a number a row and key."""
    sizes = {"batch": 1, "heads": 2, "queries": 128, "keys": 32}

    def extra(**larger: int) -> tuple[int, int]:
        inputs = make_inputs(
            **{**sizes, **larger}, head_dim=8, reference_grad=True, strided=False,
            device=device_of(backend),
        )  # fmt: skip
        with torch.no_grad(), _Allocated() as allocated:
            _call(backend, inputs)
        rows, keys = inputs.query.numel(), inputs.key.numel()
        made = allocated.bytes_beside(*inputs.tensors, *inputs.grads)
        return made, rows + 3 * keys

    before, own = extra()
    after, grown_own = extra(**{grown: 4 * sizes[grown]})
    # A map of float32 a stream would add 8 bytes a row and key; allow a quarter of one map.
    product = 1 * 2 * 128 * 32
    per_number = before / own
    assert after - before <= per_number * (grown_own - own) + 4 * 3 * product / 4


def _call(backend: str, inputs: Inputs) -> None:
    module = load(backend)
    module.forward(inputs.tensors, inputs.options)
    module.backward(inputs.grads._replace(attn_probs=None), inputs.tensors, inputs.options)
