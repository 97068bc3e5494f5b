"""Every backend on a CUDA device: accuracy, races, graph replay, streams, 64-bit offsets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from common.providers import EAGER, Workload, providers
from common.reference import Results, errors, float64_results, problem_with
from common.reference import make_inputs as make_large_inputs
from common.shapes import MODELS, TEXT_TOKENS, Problem
from common.timing import captured
from ops.inputs import Inputs, make_inputs
from ops.oracle import check_backend
from torch import Tensor

from sefi_fast.ops import available_backends, fused_cross_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
REPEATS = 50


@pytest.fixture(params=["triton", "cuda", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    if why_not := available_backends()[request.param]:
        pytest.skip(why_not)
    return str(request.param)


# queries, head_dim, heads, keys: every head_dim with its own tile, odd lengths, few and many keys.
ODD = [(100, 40, 3, 77), (33, 72, 2, 77), (65, 160, 2, 77), (130, 64, 2, 77)]
ODD += [(70, 64, 2, keys) for keys in (1, 16, 80, 81, 200)]
LAYERS = [
    (layer.queries, layer.head_dim, layer.heads, TEXT_TOKENS)
    for layers in MODELS.values()
    for layer in layers
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD + LAYERS, ids=str)
def test_results_keep_the_accuracy_rule(
    backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    queries, head_dim, heads, keys = shape
    inputs = make_inputs(2, heads, queries, keys, head_dim, dtype, device=DEVICE)
    check_backend(backend, inputs)


FEATURES: dict[str, dict[str, Any]] = {
    "averaged maps": {"queries": 100, "head_dim": 40, "tokens": 3},
    "maps of all heads": {
        "queries": 65, "head_dim": 64, "tokens": 3, "probs_all_heads": True, "weights": True
    },
    "reference gradient": {
        "queries": 130, "head_dim": 80, "reference_grad": True, "weights": True
    },
    "masked sample": {"queries": 70, "head_dim": 40, "mask": True, "tokens": 3},
    "shared keys": {
        "queries": 96, "head_dim": 160, "broadcast_kv": True, "broadcast_reference": True,
        "reference_grad": True, "tokens": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_keep_the_accuracy_rule(backend: str, feature: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(batch=3, heads=4, dtype=dtype, device=DEVICE, **FEATURES[feature])
    check_backend(backend, inputs)


def run(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """Return output, subject loss and the gradients of query, key and value."""
    leaves = inputs.query, inputs.key, inputs.value
    for leaf in leaves:
        leaf.requires_grad_()
    found = fused_cross_attention(*leaves, **inputs.keywords(), backend=backend)
    outputs = (found.output, found.subject_loss)
    return outputs + torch.autograd.grad(outputs, leaves, inputs.grads[:2])


def layer(queries: int, batch: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Return inputs of a layer of Stable Diffusion 1.5."""
    found = next(one for one in MODELS["sd15"] if one.queries == queries)
    return make_inputs(
        batch, found.heads, queries, head_dim=found.head_dim, dtype=dtype, seed=seed, device=DEVICE
    )


def same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [4096, 256, 64])
def test_repeats_give_the_same_bits(backend: str, queries: int, dtype: torch.dtype) -> None:
    inputs = layer(queries, 16, dtype)
    first = run(inputs, backend)
    for repeat in range(1, REPEATS):
        assert same_bits(first, run(inputs, backend)), f"repeat {repeat} differs from the first"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_replayed_graph_gives_the_bits_of_a_call_on_new_inputs(
    backend: str, dtype: torch.dtype
) -> None:
    inputs = layer(1024, 2, dtype, seed=1)
    replay = captured(lambda: run(inputs, backend))
    for seed in (2, 3):
        new = layer(1024, 2, dtype, seed)
        with torch.no_grad():
            for target, source in zip(vars(inputs).values(), vars(new).values(), strict=True):
                if isinstance(target, Tensor):
                    target.copy_(source)
        replayed = tuple(tensor.clone() for tensor in replay())
        torch.cuda.synchronize()
        assert same_bits(replayed, run(new, backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_side_stream_waits_for_its_own_work(backend: str, dtype: torch.dtype) -> None:
    source = layer(1024, 4, dtype)

    def copied() -> Inputs:
        tensors = {k: x.clone() for k, x in vars(source).items() if isinstance(x, Tensor)}
        return dataclasses.replace(source, **tensors)

    wanted = run(copied(), backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The copies are not ready before this ends: a kernel on another stream would read garbage.
        torch.cuda._sleep(200_000_000)
        found = run(copied(), backend)
    stream.synchronize()
    assert same_bits(wanted, found)


def test_more_than_2_to_31_elements(backend: str) -> None:
    """Samples after the 2³¹st element agree with float64, by the same rule."""
    if backend == "eager":
        pytest.skip("its maps do not fit into memory")
    heads, queries, head_dim, dtype = 8, 4096, 40, torch.bfloat16
    batch = 2**31 // (heads * queries * head_dim) + 2
    needed, (free, _) = 6 * 4 * batch * heads * queries * head_dim, torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, {free >> 30} are")
    (provider,) = (
        one for one in providers(DEVICE, [f"sefi-{backend}"])[0] if one.name == f"sefi-{backend}"
    )
    inputs = make_large_inputs(Problem("sd15", queries, head_dim, heads, batch), DEVICE, dtype)
    results = Workload(provider, inputs).results()
    for place in (0, batch // 2, batch - 2, batch - 1):
        query, key, value = (
            tensor.detach()[place : place + 1].requires_grad_() for tensor in inputs[:3]
        )
        alone = inputs._replace(
            query=query,
            key=key,
            value=value,
            grad_output=inputs.grad_output[place : place + 1],
            grad_subject_loss=inputs.grad_subject_loss[place : place + 1],
        )
        true = float64_results(alone)
        eager = errors(Workload(EAGER, alone).results(), true)
        found = Results._make(
            None if tensor is None else tensor[place : place + 1] for tensor in results
        )
        wrong = problem_with(errors(found, true), eager, dtype, strict=True)
        assert wrong is None, f"sample {place} of {batch}: {wrong}"
