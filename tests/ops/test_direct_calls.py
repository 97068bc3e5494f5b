"""Direct calls of the registered ops with arguments that do not fit.

Each ends in an error of this library or in the eager backend's numbers. The long run, and the
default one with AddressSanitizer in the native core, are

    pytest tests/ops/test_direct_calls.py -m long
    python tests/sanitized.py tests/ops/test_direct_calls.py
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.oracle import FAST_BACKENDS, make_inputs
from torch import Tensor

from sefi_fast.errors import BackendError

FORWARD = torch.ops.sefi_fast.fused_cross_attention.default
BACKWARD = torch.ops.sefi_fast.fused_cross_attention_backward.default
INPUTS = ("query", "key", "value", "reference_key", "token_weights", "key_mask", "probs_positions")
GRADS = ("grad_output", "grad_subject_loss", "grad_attn_probs")
OPTIONS = ("probs_all_heads", "scale", "reference_grad", "backend")
# Triton's interpreter is slow, and its addresses have their own tests.
BACKENDS = [name for name in FAST_BACKENDS if name != "triton"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Arguments = dict[str, Any]


def _good(rng: random.Random) -> Arguments:
    flags = ("reference", "weights", "mask", "probs_all_heads", "broadcast_kv", "reference_grad")
    options: dict[str, Any] = {name: rng.random() < 0.5 for name in flags}
    sizes = {"batch": 3, "heads": 2, "queries": 24, "keys": 64, "head_dim": 64}
    inputs = make_inputs(
        **{name: rng.randint(1, most) for name, most in sizes.items()},
        dtype=rng.choice(DTYPES),
        tokens=rng.randint(0, 2),
        strided=rng.random() < 0.5,
        seed=rng.randint(0, 2**31),
        **options,
    )
    given = dict(zip(GRADS + INPUTS, inputs.grads + inputs.tensors, strict=True))
    given = {name: None if rng.random() < 0.1 else x for name, x in given.items()}
    for name in INPUTS[:3]:
        given[name] = getattr(inputs, name)
    values = (inputs.probs_all_heads, rng.choice([None, inputs.scale, -0.5, 0.0]))
    values += (inputs.reference_grad, rng.choice([None, *BACKENDS]))
    needs = [rng.random() < 0.7 for _ in range(3)] + [given["reference_key"] is not None]
    return given | dict(zip(OPTIONS, values, strict=True)) | {"needs": needs}


def _resized(tensor: Tensor, rng: random.Random) -> Tensor:
    """One size along one axis is another: one more, one less, none, or very many."""
    shape = list(tensor.shape)
    axis = rng.randrange(len(shape))
    shape[axis] = rng.choice([shape[axis] + 1, max(shape[axis] - 1, 0), 0, 257, 1])
    made = torch.randn(shape) if tensor.is_floating_point() else torch.ones(shape)
    return made.to(tensor.dtype)


def _stripped(tensor: Tensor, rng: random.Random) -> Tensor:
    """The storage is smaller than the tensor, or nothing."""
    copy = tensor.clone()
    storage = copy.untyped_storage()
    storage.resize_(rng.choice([0, storage.nbytes() // 2]))
    return copy


def _unstored_view(tensor: Tensor, rng: random.Random) -> Tensor:
    """A view that begins beyond the start of a storage that was resized to nothing."""
    buffer = torch.cat([tensor.flatten(), tensor.flatten()])
    view = buffer[tensor.numel() :].view(tensor.shape)
    buffer.untyped_storage().resize_(0)
    return view


def _negated(tensor: Tensor, rng: random.Random) -> Tensor:
    """Minus the tensor, as the bit that PyTorch resolves late."""
    if not tensor.is_floating_point() or not tensor.dim():
        return tensor
    return torch.complex(torch.zeros(tensor.shape), tensor.float()).conj().imag.to(tensor.dtype)


def _repeated(tensor: Tensor, rng: random.Random) -> Tensor:
    """The first along some axis, with stride 0."""
    axis = rng.randrange(tensor.dim())
    if not tensor.shape[axis]:
        return tensor
    return tensor.narrow(axis, 0, 1).expand(tensor.shape)


def _overlapping(tensor: Tensor, rng: random.Random) -> Tensor:
    """Every row begins one element behind the one before."""
    if tensor.dim() < 2 or tensor.numel() < 2:
        return tensor
    shape = tensor.shape
    return tensor.contiguous().flatten().as_strided(shape, (0,) * (len(shape) - 2) + (1, 1))


CHANGES: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    _resized,
    _resized,
    _resized,
    _stripped,
    _unstored_view,
    _negated,
    _repeated,
    lambda x, rng: _overlapping(x, rng) if sum(x.shape[-2:]) <= x.numel() else x,
    lambda x, rng: x.flatten(),
    lambda x, rng: x[None],
    lambda x, rng: x[0] if x.dim() and len(x) else x,
    lambda x, rng: x.transpose(-1, -2) if x.dim() > 1 else x,
    lambda x, rng: x.transpose(0, 1) if x.dim() > 1 else x,
    lambda x, rng: x[..., ::2],
    lambda x, rng: x.to(rng.choice([torch.float64, torch.float16, torch.int64, torch.complex64])),
    lambda x, rng: x.to("meta"),
    lambda x, rng: x.to_sparse(),
    lambda x, rng: torch.nested.nested_tensor([x]),
    lambda x, rng: torch.nested.nested_tensor([x], layout=torch.jagged),
    lambda x, rng: x.to_mkldnn() if x.dtype == torch.float32 and x.numel() else x,
    lambda x, rng: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda x, rng: x.as_subclass(torch.nn.Parameter) if x.is_floating_point() else x,
    lambda x, rng: x.clone().requires_grad_() if x.is_floating_point() else x,
    lambda x, rng: None,
)
OTHER = {
    "probs_all_heads": [True, False],
    "scale": [float("nan"), float("inf"), -1.0, 2.0],
    "reference_grad": [True, False],
    "backend": ["cutlass", *BACKENDS],
    "needs": [[], [True] * 3, [True] * 5, [True] * 4, [False] * 4],
}


def _spoilt(rng: random.Random, call: Arguments, names: tuple[str, ...]) -> str:
    """Change up to three of the arguments, and say which and how."""
    said = []
    for name in rng.sample(names, rng.randint(1, 3)):
        if name in OTHER:
            call[name] = rng.choice(OTHER[name])
            said.append(f"{name}={call[name]}")
        elif isinstance(call[name], Tensor):
            place = rng.randrange(len(CHANGES))
            call[name] = CHANGES[place](call[name], rng)
            said.append(f"{name}: change {place}")
    return ", ".join(said)


def _run(call: Arguments, backward: bool) -> list[Tensor]:
    values = [call[name] for name in (GRADS if backward else ()) + INPUTS + OPTIONS]
    return list(BACKWARD(*values, call["needs"]) if backward else FORWARD(*values))


def _try(seed: int) -> bool:
    """One call; whether it was taken."""
    rng = random.Random(seed)
    backward = rng.random() < 0.6
    names = INPUTS + OPTIONS + ((*GRADS, "needs") if backward else ())
    call = _good(rng)
    how = _spoilt(rng, call, names)
    where = f"seed {seed}, {'backward' if backward else 'forward'}, {how}"
    try:
        found = _run(call, backward)
    except (TypeError, ValueError, BackendError) as error:
        assert any(name in str(error) for name in (*names, "head dimension", "keys", "nested")), (
            where + str(error)
        )
        return False
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    wanted = _run(call | {"backend": "eager"}, backward)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, where
        if not one.is_meta and one.numel():
            # Rounding in half precision is held elsewhere; here only what is plainly wrong.
            off = (one.double() - other.double()).abs().max().item()
            share = 0.01 if call["query"].dtype == torch.float32 else 0.15
            assert off <= share * (1 + other.abs().max().item()), where
    return True


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_direct_calls_end_in_an_error_of_ours_or_in_the_right_numbers(start: int) -> None:
    taken = sum(_try(seed) for seed in range(start, start + 100))
    assert 10 < taken < 90


@pytest.mark.long
def test_thousands_of_direct_calls() -> None:
    for seed in range(1000, 11000):
        _try(seed)
