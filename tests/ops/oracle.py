"""Float64 truth of the operator, and the accuracy rule that every backend is held to."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from ops.inputs import Inputs, make_inputs
from torch import Tensor

from sefi_fast.ops import available_backends, eager, fused_cross_attention
from sefi_fast.ops.dispatch import load
from sefi_fast.ops.inputs import OutputGrads

__all__ = [
    "BACKENDS",
    "FAST_BACKENDS",
    "GRADIENTS",
    "GRADIENTS_OF",
    "OUTPUTS",
    "Inputs",
    "Results",
    "autograd_results",
    "backend_results",
    "call_operator",
    "check_backend",
    "check_results",
    "device_of",
    "has_layout",
    "log_sum_exp_subject_loss",
    "make_inputs",
    "operator_results",
    "poisoned_empty",
    "reference64",
    "weighted_sum",
]

# Backends that run on this machine.
BACKENDS = [name for name, reason in available_backends().items() if reason is None]
# Triton's interpreter takes a second a call.
FAST_BACKENDS = [name for name in BACKENDS if name != "triton" or torch.cuda.is_available()]

OUTPUTS = ("output", "subject_loss", "attn_probs")
GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_reference_key")
# Each output's gradient alone, then all three: an extra output's gradient is easily dropped.
GRADIENTS_OF = (*OUTPUTS, "all")
ULPS = 4
# A backend's exponential may end at the smallest normal float32 where the truth is 0.
NOTHING = 1e-30


class Results(NamedTuple):
    """Outputs by name, and gradients by the outputs whose gradients were given and by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, dict[str, Tensor | None]]


def device_of(backend: str) -> str:
    """Return the device on which a backend is tested."""
    return "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"


def call_operator(inputs: Inputs, backend: str | None = None, **changes: Any) -> Any:
    """Call the public operator on these inputs."""
    arguments = inputs.keywords() | {"backend": backend} | changes
    return fused_cross_attention(inputs.query, inputs.key, inputs.value, **arguments)


def weighted_sum(inputs: Inputs, outputs: Sequence[Tensor]) -> Any:
    """Return a scalar whose gradients for the outputs are the inputs' gradients."""
    pairs = zip(outputs, inputs.grads, strict=True)
    return sum((output * grad).sum() for output, grad in pairs)


def chosen_grads(inputs: Inputs, which: str) -> OutputGrads:
    """Return the gradients of the outputs, None for all but `which` (one, or "all")."""
    pairs = zip(OUTPUTS, inputs.grads, strict=True)
    return OutputGrads(*(grad if which in (name, "all") else None for name, grad in pairs))


def autograd_results(inputs: Inputs) -> Results:
    """Return the results of the eager forward and PyTorch's autograd, without our backward."""
    inputs = inputs.trainable()
    leaves = {
        f"grad_{name}": getattr(inputs, name)
        for name in ("query", "key", "value", "reference_key")
        if getattr(inputs, name) is not None
    }
    outputs = eager.forward(inputs.tensors, inputs.options)
    gradients: dict[str, dict[str, Tensor | None]] = {}
    for which in GRADIENTS_OF:
        pairs = [
            (output, grad.to(output.dtype))
            for output, grad in zip(outputs, chosen_grads(inputs, which), strict=True)
            if grad is not None and output.requires_grad
        ]
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if pairs:
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                list(leaves.values()),
                [grad for _, grad in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        gradients[which] = {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }
    detached = {name: tensor.detach() for name, tensor in zip(OUTPUTS, outputs, strict=True)}
    return Results(detached, gradients)


def reference64(inputs: Inputs) -> Results:
    """Return the truth: everything in float64."""
    return autograd_results(inputs.double())


def rounded_again(inputs: Inputs, seed: int) -> Results:
    """Return the truth for inputs that differ by about one rounding.

    A sum of D products taken one by one errs √D times as much as one rounding of each; a quarter
    is granted.
    """
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(inputs.query.dtype).eps * max(1.0, inputs.query.shape[3] ** 0.5 / 4)

    def nudge(tensor: Tensor) -> Tensor:
        noise = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1
        return tensor.double() * (1 + eps * noise.to(tensor.device))

    names = ("query", "key", "value", "reference_key", "grad_output")
    nudged = {name: nudge(x) for name in names if (x := getattr(inputs, name)) is not None}
    return reference64(dataclasses.replace(inputs, **nudged))


def backend_results(backend: str | Any, inputs: Inputs) -> Results:
    """Return a backend's results, called as the operator calls it, on allocations full of NaN.

    Args:
        backend: a backend's name, or any object with its `forward` and `backward`.
    """
    module = load(backend) if isinstance(backend, str) else backend
    tensors, options = inputs.tensors, inputs.options
    with torch.no_grad(), poisoned_empty():
        outputs = dict(zip(OUTPUTS, module.forward(tensors, options), strict=True))
        gradients = {}
        for which in GRADIENTS_OF:
            found = module.backward(chosen_grads(inputs, which), tensors, options)
            gradients[which] = dict(zip(GRADIENTS, found, strict=True))
    return Results(outputs, gradients)


def operator_results(inputs: Inputs, backend: str | None = None) -> Results:
    """Return the results of the public operator and autograd, on allocations full of NaN."""
    inputs = inputs.trainable()
    names = [name for name in GRADIENTS if getattr(inputs, name[5:]) is not None]
    leaves = [getattr(inputs, name[5:]) for name in names]
    with poisoned_empty():
        outputs = call_operator(inputs, backend)
        gradients = {}
        for which in GRADIENTS_OF:
            pairs = zip(outputs, chosen_grads(inputs, which), strict=True)
            given = [(output, grad) for output, grad in pairs if grad is not None]
            found = torch.autograd.grad(
                [output for output, _ in given],
                leaves,
                [grad.to(output.dtype) for output, grad in given],
                retain_graph=True,
                allow_unused=True,
            )
            gradients[which] = dict(zip(names, found, strict=True))
    detached = {name: tensor.detach() for name, tensor in zip(OUTPUTS, outputs, strict=True)}
    return Results(detached, gradients)


def check_backend(backend: str | Any, inputs: Inputs, *, factor: float = 2.0) -> None:
    """The accuracy rule: for each output, and each gradient of each output alone and of all,

        largest error ≤ factor · the eager path's in the same dtype + 4 ulps of the largest value,

    for the subject loss 16 ulps, errors taken against float64. The eager path's error is at least
    what inputs that are rounded once more lead to. Shapes, dtypes and strides must be the
    promised ones.

    Raises:
        AssertionError: one line for each result that is wrong.
    """
    check_results(backend_results(backend, inputs), inputs, factor=factor)


def check_results(
    found: Results,
    inputs: Inputs,
    *,
    factor: float = 2.0,
    beside: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """`check_backend` for results that are already at hand.

    Args:
        beside: an error that is allowed on top: of outputs under "outputs" and the name, of
            gradients under their origin and the name.
    """
    truth, plains = reference64(inputs), [autograd_results(inputs)]
    # The eager path's error in a single number may be near zero by luck, on one processor only.
    plains += [rounded_again(inputs, seed) for seed in range(2)]
    wide = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    wrong: list[str] = []
    for name, true in truth.outputs.items():
        got = found.outputs[name]
        dtype = inputs.query.dtype if name == "output" else wide
        inner = name == "output"
        plain = [results.outputs[name] for results in plains]
        extra = 0.0 if beside is None else beside["outputs"].get(name, 0.0)
        wrong += _wrong(name, got, true, plain, dtype, inner, factor, extra)
    for which, true_gradients in truth.gradients.items():
        for name, true_gradient in true_gradients.items():
            label = f"{name} of {which}"
            got_gradient = found.gradients[which][name]
            assert true_gradient is not None
            if got_gradient is None:
                # Without reference_grad the reference key is no variable at all.
                if name != "grad_reference_key" or inputs.reference_grad:
                    wrong.append(f"{label} is None")
                continue
            plain = [x for results in plains if (x := results.gradients[which][name]) is not None]
            extra = 0.0 if beside is None else beside[which].get(name, 0.0)
            dtype = inputs.query.dtype
            wrong += _wrong(label, got_gradient, true_gradient, plain, dtype, True, factor, extra)
    assert not wrong, "\n".join(wrong)


def _wrong(
    label: str,
    got: Tensor,
    true: Tensor,
    plains: Sequence[Tensor],
    dtype: torch.dtype,
    heads_inside: bool,
    factor: float,
    extra: float,
) -> list[str]:
    if got.shape != true.shape or got.dtype != dtype:
        return [f"{label} is {got.dtype} {tuple(got.shape)}, wanted {dtype} {tuple(true.shape)}"]
    if not has_layout(got, heads_inside):
        return [f"{label} {tuple(got.shape)} has strides {got.stride()}"]
    if got.numel() == 0:
        return []
    error = (got.double() - true).abs().max().item()
    errors = [(plain.double() - true).abs().max().item() for plain in plains]
    # The eager path overflows where float16 ends; a result that is NaN allows nothing.
    allowed = factor * max([error for error in errors if math.isfinite(error)], default=0.0)
    ulps = ULPS
    if dtype == torch.float64:
        # The truth itself is rounded.
        ulps *= 16
    elif label == "subject_loss":
        # A sum over all queries and keys, in an order of the backend's own.
        ulps *= 4
    allowed += ulps * torch.finfo(dtype).eps * true.abs().max().item() + extra + NOTHING
    # A NaN compares false with everything, so the comparison that must hold is the one written.
    return [] if error <= allowed else [f"{label}: error {error:.3g}, allowed {allowed:.3g}"]


def has_layout(tensor: Tensor, heads_inside: bool) -> bool:
    """Contiguous or, with heads_inside, a [B, H, L, D] view of a contiguous [B, L, H, D].

    Strides along axes of one entry mean nothing and are free.
    """
    return (tensor.transpose(1, 2) if heads_inside else tensor).is_contiguous()


def log_sum_exp_subject_loss(inputs: Inputs) -> Tensor:
    """Equation 12 of docs/method.md summed as equation 5, float64 [B], without any map; w = 1."""
    inputs = inputs.double()
    assert inputs.reference_key is not None and inputs.token_weights is None

    def scores(key: Tensor) -> Tensor:
        found = torch.einsum(
            "bhnd,bhmd->bhnm", inputs.query, key.expand(len(inputs.query), -1, -1, -1)
        )
        if inputs.key_mask is not None:
            found = found.masked_fill(~inputs.key_mask[:, None, None, :], -torch.inf)
        return found * inputs.scale

    target, reference = scores(inputs.key), scores(inputs.reference_key)
    total = {"t": target.logsumexp(-1), "r": reference.logsumexp(-1)}
    norms = (
        ((2 * target).logsumexp(-1) - 2 * total["t"]).exp()
        + ((2 * reference).logsumexp(-1) - 2 * total["r"]).exp()
        - 2 * ((target + reference).logsumexp(-1) - total["t"] - total["r"]).exp()
    )
    return norms.sum(-1).mean(1)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Every uninitialised tensor made from Python is full of NaN, integers of their largest."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*arguments: Any, **keywords: Any) -> Tensor:
            tensor = make(*arguments, **keywords)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return (
                tensor
                if tensor.dtype == torch.bool
                else tensor.fill_(torch.iinfo(tensor.dtype).max)
            )

        return wrapper

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch, "empty_permuted"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield
