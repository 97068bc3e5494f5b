"""The Triton backend against float64, through the interpreter or on the GPU where there is one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ops.oracle import (
    GRADIENTS,
    backend_results,
    check_backend,
    check_results,
    make_inputs,
    operator_results,
)

from sefi_fast.ops import triton as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not backend.interpreted(),
    reason="neither a CUDA device nor Triton's interpreter (TRITON_INTERPRET=1)",
)

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


def inputs_for(**options: Any):
    return make_inputs(device=DEVICE, **options)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (40, FLOAT32),
        (160, FLOAT32),
        (64, FLOAT16),
        (160, FLOAT16),
        (40, BFLOAT16),
        (80, BFLOAT16),
    ],
    ids=str,
)
def test_usual_widths_and_every_dtype(head_dim: int, dtype: torch.dtype) -> None:
    check_backend(
        "triton", inputs_for(queries=37, head_dim=head_dim, dtype=dtype, tokens=2, seed=head_dim)
    )


@pytest.mark.parametrize("keys", [1, 16, 65, 77, 129, 256])
def test_any_number_of_keys(keys: int) -> None:
    check_backend(
        "triton",
        inputs_for(batch=1, queries=19, keys=keys, tokens=1, reference_grad=True, seed=keys),
    )


@pytest.mark.parametrize("head_dim", [1, 17, 33, 96, 256])
def test_any_head_width(head_dim: int) -> None:
    check_backend(
        "triton",
        inputs_for(batch=1, queries=19, keys=77, head_dim=head_dim, reference_grad=True, seed=1),
    )


@pytest.mark.parametrize("queries", [1, 2, 63, 64, 65, 130])
def test_any_number_of_queries(queries: int) -> None:
    check_backend("triton", inputs_for(batch=1, queries=queries, keys=20, head_dim=16, tokens=1))


@pytest.mark.skipif(DEVICE == "cuda", reason="a device has its own configurations only")
@pytest.mark.parametrize(
    ("capability", "head_dim", "keys"), [(80, 40, 77), (80, 80, 154), (80, 160, 21), (100, 64, 77)]
)
def test_the_configurations_of_every_architecture(
    monkeypatch: pytest.MonkeyPatch, capability: int, head_dim: int, keys: int
) -> None:
    from sefi_fast.kernels import Device

    monkeypatch.setattr(backend, "_device", lambda _: Device(capability, 2, True))
    check_backend(
        "triton",
        inputs_for(
            batch=1, queries=70, keys=keys, head_dim=head_dim, dtype=FLOAT16, weights=True,
            mask=True, tokens=2, reference_grad=True, seed=capability + head_dim,
        ),
    )  # fmt: skip
    if keys <= 80:
        # The training's call, which is pipelined on 8.0.
        plain = inputs_for(batch=1, queries=70, keys=keys, head_dim=head_dim, dtype=BFLOAT16)
        check_backend("triton", plain)


@pytest.mark.parametrize(
    ("mask", "reference_grad", "probs_all_heads"),
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
)
def test_every_two_options_together(
    mask: bool, reference_grad: bool, probs_all_heads: bool
) -> None:
    check_backend(
        "triton",
        inputs_for(
            queries=21,
            keys=70,
            head_dim=24,
            weights=True,
            mask=mask,
            tokens=4,
            reference_grad=reference_grad,
            probs_all_heads=probs_all_heads,
        ),
    )


@pytest.mark.parametrize(
    ("broadcast_kv", "broadcast_reference"), [(False, True), (True, False), (True, True)]
)
def test_batch_of_one_under_a_larger_batch(broadcast_kv: bool, broadcast_reference: bool) -> None:
    check_backend(
        "triton",
        inputs_for(
            batch=3,
            queries=37,
            keys=21,
            head_dim=16,
            weights=True,
            mask=True,
            tokens=2,
            broadcast_kv=broadcast_kv,
            broadcast_reference=broadcast_reference,
            reference_grad=True,
        ),
    )


def test_plain_attention_without_reference_or_maps() -> None:
    check_backend("triton", inputs_for(reference=False, dtype=BFLOAT16))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.7])
def test_any_scale(scale: float) -> None:
    check_backend("triton", inputs_for(batch=1, keys=21, scale=scale, reference_grad=True))


def test_contiguous_heads_of_odd_width_have_no_alignment_to_promise() -> None:
    check_backend("triton", inputs_for(head_dim=33, strided=False, dtype=FLOAT16))


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty_batch_heads_or_queries(shape: tuple[int, int, int]) -> None:
    batch, heads, queries = shape
    inputs = inputs_for(batch=batch, heads=heads, queries=queries, keys=9, head_dim=8, tokens=1)
    found = backend_results("triton", inputs)
    assert found.outputs["output"].shape == inputs.query.shape
    assert found.outputs["subject_loss"].tolist() == [0.0] * batch
    assert found.outputs["attn_probs"].shape == (batch, 1, queries)
    for name in GRADIENTS[1:3]:
        gradient = found.gradients["all"][name]
        assert gradient is not None and not gradient.any()


def test_rows_without_any_key_are_zero_and_get_no_gradient() -> None:
    inputs = inputs_for(queries=9, keys=70, mask=True, tokens=1, reference_grad=True)
    found = backend_results("triton", inputs)
    for name in ("output", "subject_loss", "attn_probs"):
        assert not found.outputs[name][-1].any()
    for name in GRADIENTS:
        gradient = found.gradients["all"][name]
        assert gradient is not None and gradient[0].any() and not gradient[-1].any()


def test_only_the_gradient_asked_for_comes_back() -> None:
    inputs = inputs_for(queries=70, keys=21, head_dim=16, tokens=1, reference_grad=True)
    options = {**inputs.options, "reference_grad": True}
    every = backend.backward(*inputs.grads, *inputs.tensors, **options, needs=(True,) * 4)
    for place, name in enumerate(GRADIENTS):
        needs = tuple(index == place for index in range(4))
        one = backend.backward(*inputs.grads, *inputs.tensors, **options, needs=needs)
        assert [gradient is not None for gradient in one] == list(needs), name
        assert torch.equal(one[place], every[place]), name


def test_repeats_agree_bit_for_bit() -> None:
    """Fifty where programs race; the interpreter runs one after the other."""
    inputs = inputs_for(batch=1, queries=70, keys=21, head_dim=16, tokens=1, reference_grad=True)

    def bits() -> list[torch.Tensor]:
        options = {**inputs.options, "reference_grad": True}
        grads = backend.backward(*inputs.grads, *inputs.tensors, **options, needs=(True,) * 4)
        return [*backend.forward(*inputs.tensors, **inputs.options), *grads]

    first = bits()
    for _ in range(50 if DEVICE == "cuda" else 3):
        assert all(torch.equal(was, now) for was, now in zip(first, bits(), strict=True))


def test_gradient_of_the_output_may_have_any_strides() -> None:
    inputs = inputs_for(batch=1, queries=19, keys=21)
    options = {**inputs.options, "reference_grad": False, "needs": (True, True, True, False)}
    wanted = backend.backward(inputs.grad_output, None, None, *inputs.tensors, **options)
    turned = inputs.grad_output.transpose(2, 3).contiguous().transpose(2, 3)
    found = backend.backward(turned, None, None, *inputs.tensors, **options)
    assert all(torch.equal(w, f) for w, f in zip(wanted[:3], found[:3], strict=True))
    constant = torch.ones((), device=DEVICE).expand_as(inputs.grad_output)
    found = backend.backward(constant, None, None, *inputs.tensors, **options)
    wanted = backend.backward(constant.contiguous(), None, None, *inputs.tensors, **options)
    assert all(torch.equal(w, f) for w, f in zip(wanted[:3], found[:3], strict=True))


def test_the_operator_runs_this_backend_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("forward", "backward"):
        run = getattr(backend, name)

        def spy(*arguments: Any, _run: Any = run, _name: str = name, **options: Any) -> Any:
            ran.append(_name)
            return _run(*arguments, **options)

        monkeypatch.setattr(backend, name, spy)
    inputs = inputs_for(queries=9, keys=21, head_dim=16, weights=True, mask=True, tokens=2)
    check_results(operator_results(inputs, "triton"), inputs)
    assert ran[0] == "forward" and set(ran[1:]) == {"backward"}


def test_reasons_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(1, 1, 2, 8)
    assert "dtype" in str(backend.why_not(query.double(), query, query, None, None))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in str(backend.why_not(query, query, query, None, None))
    meta = query.to("meta")
    assert "meta" in str(backend.why_not(meta, meta, meta, None, None))
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert "not installed" in str(backend.why_not(query, query, query, None, None))


@pytest.mark.parametrize(
    ("capability", "version", "refused"),
    [
        (90, "12.8", True),
        (90, "12.9", True),
        (90, "13.0", True),
        (90, "13.3", False),
        (90, "13.4", False),
        (90, "14.0", False),
        (80, "12.8", False),
        (100, "12.9", False),
    ],
)
def test_an_assembler_that_miscompiles_for_hopper_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, capability: int, version: str, refused: bool
) -> None:
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    from sefi_fast.kernels import ptxas

    tool = SimpleNamespace(version=version)
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: tool)
    monkeypatch.setattr(ptxas, "_candidates", lambda: iter([]))
    kept = (backend._why_not_assembler, ptxas.replacement)
    for one in kept:
        one.cache_clear()
    reason = backend._why_not_assembler(capability)
    for one in kept:
        one.cache_clear()
    assert (reason is not None) == refused
    if refused:
        assert f"ptxas {version}" in reason and "triton 3.9" in reason
        assert "TRITON_PTXAS_PATH" in reason and "nvidia-cuda-nvcc" in reason


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "keys", "refused"),
    [
        (86, torch.float32, 160, 77, False),
        (86, torch.float32, 160, 154, True),
        (80, torch.float32, 160, 154, True),
        (80, torch.float32, 80, 154, False),
        (80, torch.float32, 128, 160, True),
        (89, torch.float32, 128, 128, True),
        (89, torch.float32, 40, 256, True),
        (80, torch.float32, 256, 77, True),
        (90, torch.float32, 256, 77, False),
        (90, torch.float32, 80, 256, False),
        (89, torch.bfloat16, 256, 256, True),
        (120, torch.float16, 192, 193, True),
        (120, torch.bfloat16, 256, 128, False),
        (80, torch.bfloat16, 256, 256, False),
        (90, torch.bfloat16, 256, 192, True),
        (90, torch.bfloat16, 160, 256, False),
    ],
)
def test_what_no_program_can_hold_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype, head_dim: int,
    keys: int, refused: bool,
) -> None:  # fmt: skip
    device = SimpleNamespace(capability=capability)
    monkeypatch.setattr(backend, "cuda_device", lambda index: device)
    query = SimpleNamespace(dtype=dtype, shape=(1, 1, 4096, head_dim), get_device=lambda: 0)
    reason = backend._why_not_shared(query, SimpleNamespace(shape=(1, 1, keys, head_dim)))
    assert (reason is not None) == refused
    if refused:
        assert f"{keys} keys of {head_dim} columns" in reason
        assert ("bfloat16 fits" in reason) == (dtype == torch.float32)


def test_the_assembler_of_this_triton_has_a_version() -> None:
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    assert len(compiler.get_ptxas(90).version.split(".")) == 2
