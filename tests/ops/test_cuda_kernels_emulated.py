"""The CUDA C++ kernels against float64 in the host emulation of CUDA blocks.

`pytest -m long tests/ops/test_cuda_kernels_emulated.py` runs many more sizes and options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation.library import Emulated
from ops.cases import lay_out
from ops.oracle import GRADIENTS, Inputs, Results, backend_results, check_backend, make_inputs
from torch import Tensor

from sefi_fast.ops import cpu, fused_cross_attention

FLOAT32, FLOAT16, BFLOAT16 = DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (40, 64, 80, 160)
EVERYTHING = {"weights": True, "mask": True, "tokens": 3, "reference_grad": True}
# Without the gradient of the reference key one kernel computes dQ, dK and dV.
FUSED = {**EVERYTHING, "reference_grad": False}
# Shared memory per block of GeForce cards, of sm_80 and of sm_90.
SMALL, MIDDLE, LARGE = 99 * 1024, 163 * 1024, 227 * 1024


@pytest.fixture(scope="session")
def library(emulated_library: Path) -> Emulated:
    return Emulated(emulated_library)


@pytest.fixture
def emulated(library: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The kernels in place of the native core, whose functions have the same arguments."""
    monkeypatch.setattr(cpu, "_C", library)
    monkeypatch.setattr(library, "multiprocessors", 2)
    library.schedule(0, late_copies=True)
    library.shared_limit(LARGE)
    return library


def _cases() -> Iterator[dict[str, Any]]:
    """Arguments of make_inputs, with the emulated device under sms and limit."""
    for d, dtype in product(HEAD_DIMS, DTYPES):
        yield {"batch": 2, "head_dim": d, "dtype": dtype, "tokens": 2, "seed": d}
    for d, options in product(HEAD_DIMS, (EVERYTHING, FUSED)):
        # Probabilities of all heads, and averaged over heads.
        dtype, all_heads = (FLOAT16, True) if d in (40, 160) else (BFLOAT16, False)
        yield {"head_dim": d, "dtype": dtype, "probs_all_heads": all_heads, "batch": 2, **options}
    for queries, options in product((16, 70), (EVERYTHING, FUSED)):
        yield {"head_dim": 160, "dtype": BFLOAT16, "queries": queries, "limit": SMALL, **options}
    for d, queries in product(HEAD_DIMS, (1, 64, 65, 200)):
        yield {"head_dim": d, "heads": 3, "queries": queries, "dtype": FLOAT16, "sms": 1, **FUSED}
    for queries in (1, 16, 63, 64, 65, 130):
        yield {"queries": queries, "dtype": BFLOAT16, "tokens": 1, "reference_grad": True}
    # With head_dim 80 one more block fits on a multiprocessor of sm_80 if it has a single tile of
    # queries. With 160 two warps share 16 rows, and each has half of the keys.
    for keys, limit in product((1, 15, 64, 65, 80), (MIDDLE, LARGE)):
        options = {"heads": 3, "queries": 150, "dtype": BFLOAT16, "sms": 1, "limit": limit}
        yield {"head_dim": 80, "keys": keys, **options, **FUSED}
    for keys, sharpness in product((1, 39, 40, 41, 77), (1, 8)):
        options = {"queries": 80, "dtype": BFLOAT16, "limit": MIDDLE, "sharpness": sharpness}
        yield {"head_dim": 160, "keys": keys, **options, **FUSED}
    yield {"dtype": FLOAT16, "reference_grad": True, "sharpness": 12}
    for keys in (1, 8, 16, 17, 79, 80, 81):
        options = {"dtype": FLOAT16, "tokens": 2, "reference_grad": True}
        yield {"head_dim": 64, "queries": 20, "keys": keys, **options}
    for d, keys, dtype in ((17, 5, FLOAT32), (1, 77, BFLOAT16), (256, 256, FLOAT16)):
        options = {"keys": keys, "dtype": dtype, "limit": SMALL}
        yield {"head_dim": d, "queries": 19, **options, **EVERYTHING}
    for d in (40, 80, 160):
        yield {"head_dim": d, "queries": 90, "dtype": FLOAT16, "reference": False, "tokens": 2}
    for scale in (0.0, 1.0, -0.25):
        yield {"scale": scale, "dtype": FLOAT16, **EVERYTHING}
    for kv, reference, dtype in product((True, False), (True, False), (FLOAT32, BFLOAT16)):
        shared = {"broadcast_kv": kv, "broadcast_reference": reference}
        yield {"batch": 3, "dtype": dtype, **shared, **EVERYTHING}
    for sms in (1, 16, 200):
        yield {"heads": 1, "queries": 300, "dtype": BFLOAT16, "sms": sms, "reference_grad": True}
    # Two splits of 128 heads: enough blocks that one thread adds each partial sum.
    yield {"batch": 4, "heads": 32, "queries": 70, "dtype": FLOAT16, "sms": 200}


def _name(case: dict[str, Any]) -> str:
    return ",".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in case.items())


def check(emulated: Emulated, case: dict[str, Any]) -> None:
    options = {"batch": 1, **case}
    emulated.multiprocessors = options.pop("sms", 2)
    emulated.shared_limit(options.pop("limit", LARGE))
    sharpness = options.pop("sharpness", 1)
    inputs = make_inputs(**options)
    for name in ("query", "key", "reference_key"):
        if sharpness != 1:
            getattr(inputs, name).mul_(sharpness)
    check_backend("cpu", inputs)


@pytest.mark.parametrize("case", list(_cases()), ids=_name)
def test_accuracy(emulated: Emulated, case: dict[str, Any]) -> None:
    check(emulated, case)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 33, 40, 48, 64, 80, 96, 120, 160, 200, 256])
def test_accuracy_of_every_head_dim_with_every_count_of_keys(
    emulated: Emulated, head_dim: int, dtype: torch.dtype
) -> None:
    for seed, keys in enumerate((1, 2, 15, 16, 33, 64, 76, 77, 80, 81, 129, 256)):
        case = {"queries": 35, "keys": keys, "head_dim": head_dim, "dtype": dtype, "seed": seed}
        check(emulated, {"batch": 2, **case, **EVERYTHING})


@pytest.mark.long
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_accuracy_of_every_combination_of_options(emulated: Emulated, head_dim: int) -> None:
    names = ("weights", "mask", "reference", "reference_grad", "broadcast_kv", "probs_all_heads")
    for seed, flags in enumerate(product((False, True), repeat=len(names))):
        emulated.schedule(seed, late_copies=seed % 3 > 0)
        case = {"head_dim": head_dim, "dtype": BFLOAT16 if seed % 2 else FLOAT16, "seed": seed}
        case |= {"batch": 2, "queries": 66 + seed, "tokens": seed % 4, "sms": 1 + seed % 5}
        check(emulated, case | dict(zip(names, flags, strict=True)))


@pytest.mark.parametrize("layout", ["offset", "padded", "one row", "one head", "one sample"])
def test_accuracy_of_layouts(emulated: Emulated, layout: str) -> None:
    inputs = make_inputs(2, 2, 21, dtype=BFLOAT16, strided=False, reference_grad=True)
    names = ["query", "grad_output"]
    if layout != "one row":
        # Equal keys have a gradient of rounding errors alone, without a size to compare with.
        names += ["key", "value", "reference_key"]
    laid = {name: lay_out(getattr(inputs, name), layout) for name in names}
    check_backend("cpu", dataclasses.replace(inputs, **laid))


# Half of the keys of a warp pair, all keys, or all keys but one. A single key has no loss.
@pytest.mark.parametrize("visible", [range(40, 80), range(40), (), (0, 1, 2, 77, 78, 79), (5,)])
@pytest.mark.parametrize("head_dim", [40, 160])
def test_accuracy_with_few_visible_keys(emulated: Emulated, head_dim: int, visible: Any) -> None:
    inputs = make_inputs(1, 2, 70, 80, head_dim, FLOAT16, **FUSED)
    inputs.key_mask[:] = torch.isin(torch.arange(80), torch.tensor(list(visible)))
    check_backend("cpu", inputs)


def test_nan_reaches_the_loss_of_a_single_visible_key(emulated: Emulated) -> None:
    inputs = make_inputs(1, 1, 70, dtype=BFLOAT16, mask=True)
    inputs.key_mask[:] = torch.arange(77) == 5
    inputs.query[0, 0, 3] = torch.nan
    assert backend_results("cpu", inputs).outputs["subject_loss"].isnan().all()


@pytest.mark.parametrize("size", [6000.0, 7500.0, 12000.0])
def test_probabilities_of_large_scores_have_a_sum_of_one(emulated: Emulated, size: float) -> None:
    """The rounding error of a score is large here, but not that of the sum of a row."""
    generator = torch.Generator().manual_seed(int(size))
    inputs = make_inputs(1, 2, 64, 16, 64, FLOAT16, scale=0.125)
    for tensor in (inputs.query, inputs.key):
        tensor.copy_(size + 300 * torch.randn(tensor.shape, generator=generator))
    scores = inputs.query.double() @ inputs.key.double().transpose(-1, -2) * 0.125
    true = torch.softmax(scores, -1) @ inputs.value.double()
    output = backend_results("cpu", inputs).outputs["output"]
    torch.testing.assert_close(output.double(), true, rtol=1e-2, atol=1e-2)


def tensors(results: Results) -> list[Tensor]:
    gradients = (g for which in results.gradients.values() for g in which.values())
    return [*results.outputs.values(), *(g for g in gradients if g is not None)]


def assert_same_bits(one: Results, other: Results) -> None:
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "limit", "options"),
    [
        *((d, BFLOAT16, limit, FUSED) for d in HEAD_DIMS for limit in (MIDDLE, LARGE)),
        *((160, BFLOAT16, limit, EVERYTHING) for limit in (SMALL, LARGE)),
        (40, FLOAT16, LARGE, EVERYTHING),
        (20, FLOAT32, LARGE, EVERYTHING),
    ],
)
def test_order_of_threads_and_copies_changes_no_bit(
    emulated: Emulated, head_dim: int, dtype: torch.dtype, limit: int, options: Any
) -> None:
    inputs = make_inputs(1, 2, 150, 77, head_dim, dtype, **options)
    emulated.multiprocessors = 1
    emulated.shared_limit(limit)
    first = backend_results("cpu", inputs)
    for seed, late in ((1, True), (2, False)):
        emulated.schedule(seed, late_copies=late)
        assert_same_bits(backend_results("cpu", inputs), first)


@pytest.mark.parametrize("reference_grad", [True, False])
@pytest.mark.parametrize("head_dim, dtype", [(64, FLOAT16), (160, BFLOAT16), (64, FLOAT32)])
def test_identical_streams_have_no_loss_and_no_gradient(
    emulated: Emulated, head_dim: int, dtype: torch.dtype, reference_grad: bool
) -> None:
    options = {"head_dim": head_dim, "dtype": dtype, "reference_grad": reference_grad}
    inputs = make_inputs(**options, weights=True)
    found = backend_results("cpu", dataclasses.replace(inputs, reference_key=inputs.key.clone()))
    assert not found.outputs["subject_loss"].any()
    gradients = (found.gradients["subject_loss"][name] for name in GRADIENTS)
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_hidden_keys_reach_no_result(emulated: Emulated, dtype: torch.dtype) -> None:
    inputs = make_inputs(1, dtype=dtype, **EVERYTHING)
    wanted = backend_results("cpu", inputs)
    hidden = ~inputs.key_mask[0]
    assert hidden.any()
    for name in ("key", "value", "reference_key"):
        getattr(inputs, name)[:, :, hidden] = torch.nan
    assert_same_bits(backend_results("cpu", inputs), wanted)


def gradients(inputs: Inputs, wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Return the gradients of the wanted tensors alone."""
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value} | inputs.keywords()
    leaves = {name: tensors[name].detach().requires_grad_() for name in wanted}
    results = fused_cross_attention(**{**tensors, **leaves}, backend="cpu")
    pairs = [(x, g.to(x.dtype)) for x, g in zip(results, inputs.grads, strict=True) if x.grad_fn]
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, list(leaves.values()), grads)


@pytest.mark.parametrize("options", [EVERYTHING, FUSED], ids=["separate", "fused"])
@pytest.mark.parametrize("head_dim", [17, 40, 64, 160])
def test_gradients_do_not_depend_on_which_are_wanted(
    emulated: Emulated, head_dim: int, options: Any
) -> None:
    inputs = make_inputs(1, 2, 100, head_dim=head_dim, dtype=BFLOAT16, **options)
    names = ("query", "key", "value", "reference_key")[: 4 if inputs.reference_grad else 3]
    together = dict(zip(names, gradients(inputs, names), strict=True))
    for wanted in (w for n in range(1, len(names)) for w in combinations(names, n)):
        for name, gradient in zip(wanted, gradients(inputs, wanted), strict=True):
            assert torch.equal(gradient, together[name]), (name, wanted)
