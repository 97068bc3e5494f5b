"""Float64 truth of the operator, and the accuracy rule that every backend is held to."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sefi_fast.ops import eager
from sefi_fast.ops.backends import load

OUTPUTS = ("output", "alignment", "maps")
GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_reference_key")
# Each output's gradient alone, then all three: an extra output's gradient is easily dropped.
GRADIENTS_OF = (*OUTPUTS, "all")
ULPS = 4


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One call of the operator and the gradients that reach its outputs."""

    query: Tensor
    key: Tensor
    value: Tensor
    reference_key: Tensor | None
    token_weights: Tensor | None
    key_mask: Tensor | None
    map_tokens: Tensor | None
    map_all_heads: bool
    scale: float
    reference_grad: bool
    grad_output: Tensor
    grad_alignment: Tensor
    grad_maps: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The seven tensors that every backend's functions take in this order."""
        return (
            self.query,
            self.key,
            self.value,
            self.reference_key,
            self.token_weights,
            self.key_mask,
            self.map_tokens,
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"map_all_heads": self.map_all_heads, "scale": self.scale}

    @property
    def grads(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.grad_output, self.grad_alignment, self.grad_maps

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `fused_cross_attention` for this call."""
        return {
            "reference_key": self.reference_key,
            "token_weights": self.token_weights,
            "key_mask": self.key_mask,
            "map_tokens": self.map_tokens,
            "map_heads": "all" if self.map_all_heads else "mean",
            "scale": self.scale,
            "reference_grad": self.reference_grad,
        }

    def double(self) -> Inputs:
        """The same numbers in float64: rounding them is not the operator's error."""
        doubled = {
            field.name: value.double()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.is_floating_point()
        }
        return dataclasses.replace(self, **doubled)

    def trainable(self) -> Inputs:
        """Leaves that share storage and strides with these tensors and require gradients."""
        names = ("query", "key", "value", "reference_key")
        leaves = {
            name: tensor.detach().requires_grad_()
            for name in names
            if (tensor := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **leaves)


def make_inputs(
    batch: int = 2,
    heads: int = 2,
    queries: int = 33,
    keys: int = 77,
    head_dim: int = 40,
    dtype: torch.dtype = torch.float32,
    *,
    reference: bool = True,
    weights: bool = False,
    mask: bool = False,
    tokens: int = 0,
    map_all_heads: bool = False,
    broadcast_kv: bool = False,
    broadcast_reference: bool = False,
    strided: bool = True,
    reference_grad: bool = False,
    scale: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Inputs:
    """Fresh random inputs of one call.

    Args:
        weights: with token weights from 0 to 2.
        mask: with a key mask; its last sample may attend to nothing.
        tokens: how many columns to return; every third asks for no column (a negative entry).
        broadcast_kv, broadcast_reference: key and value, or the reference key, of batch 1; weights,
            mask and map tokens too where both hold.
        strided: [B, H, L, D] as views of wider [B, L, ...] buffers, NaN around them, so that a read
            outside shows; else contiguous.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def place(values: Tensor) -> Tensor:
        values = values.to(dtype)
        if not strided:
            return values.to(device)
        size, inner, length, width = values.shape
        # Sixteen more elements a row keep rows 16-byte aligned where they were.
        buffer = torch.full((size, length, inner * width + 16), torch.nan, dtype=dtype)
        view = buffer.to(device)[:, :, 8 : 8 + inner * width]
        view = view.unflatten(2, (inner, width)).transpose(1, 2)
        return view.copy_(values)

    kv_batch = 1 if broadcast_kv else batch
    reference_batch = 1 if broadcast_reference else batch
    extra_batch = 1 if broadcast_kv and broadcast_reference else batch
    key = random(kv_batch, heads, keys, head_dim)
    drift = random(reference_batch, heads, keys, head_dim)
    near = key if kv_batch == reference_batch else key[:1]
    # The order of the draws is fixed, so that switching an option on changes no other tensor.
    weight_values = 2 * torch.rand(extra_batch, keys, generator=generator)
    mask_values = torch.rand(extra_batch, keys, generator=generator) > 0.3
    if extra_batch:
        mask_values[-1] = False
        if extra_batch == 1:
            mask_values[:, : max(1, keys // 2)] = True
    token_values = torch.randint(0, keys, (extra_batch, tokens), generator=generator)
    token_values[:, 2::3] = -1
    map_shape = (batch, heads, tokens, queries) if map_all_heads else (batch, tokens, queries)
    return Inputs(
        query=place(random(batch, heads, queries, head_dim)),
        key=place(key),
        value=place(random(kv_batch, heads, keys, head_dim)),
        reference_key=place(0.8 * near + 0.6 * drift) if reference else None,
        token_weights=weight_values.to(device) if weights else None,
        key_mask=mask_values.to(device) if mask else None,
        map_tokens=token_values.to(device) if tokens else None,
        map_all_heads=map_all_heads,
        scale=head_dim**-0.5 if scale is None else scale,
        reference_grad=reference_grad,
        grad_output=place(random(batch, heads, queries, head_dim)),
        grad_alignment=random(batch).to(device),
        grad_maps=random(*map_shape).to(device),
    )


class Results(NamedTuple):
    """Outputs by name, and gradients by the outputs whose gradients were given and by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, dict[str, Tensor | None]]


def chosen_grads(inputs: Inputs, which: str) -> list[Tensor | None]:
    """Gradients of output, alignment and maps, None for all but `which` (one, or "all")."""
    return [
        grad if which in (name, "all") else None
        for name, grad in zip(OUTPUTS, inputs.grads, strict=True)
    ]


def autograd_results(inputs: Inputs) -> Results:
    """What the eager forward and PyTorch's own autograd give, without the closed-form backward."""
    inputs = inputs.trainable()
    leaves = {
        f"grad_{name}": getattr(inputs, name)
        for name in ("query", "key", "value", "reference_key")
        if getattr(inputs, name) is not None
    }
    outputs = eager.forward(
        *inputs.tensors, **inputs.options, reference_grad=inputs.reference_grad
    )
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
    """The truth: everything in float64."""
    return autograd_results(inputs.double())


def backend_results(backend: str | Any, inputs: Inputs) -> Results:
    """What a backend gives, called as the operator calls it, on allocations full of NaN.

    Args:
        backend: a backend's name, or any object with its `forward` and `backward`.
    """
    module = load(backend) if isinstance(backend, str) else backend
    needs = (True, True, True, inputs.reference_key is not None)
    with torch.no_grad(), poisoned_empty():
        outputs = dict(
            zip(OUTPUTS, module.forward(*inputs.tensors, **inputs.options), strict=True)
        )
        gradients = {
            which: dict(
                zip(
                    GRADIENTS,
                    module.backward(
                        *chosen_grads(inputs, which),
                        *inputs.tensors,
                        **inputs.options,
                        reference_grad=inputs.reference_grad,
                        needs=needs,
                    ),
                    strict=True,
                )
            )
            for which in GRADIENTS_OF
        }
    return Results(outputs, gradients)


def check_backend(backend: str | Any, inputs: Inputs, *, factor: float = 2.0) -> None:
    """The accuracy rule: for each output, and each gradient of each output alone and of all,

        largest error ≤ factor · the eager path's in the same dtype + 4 ulps of the largest value,

    errors taken against float64. Shapes, dtypes and strides must be the promised ones too.

    Raises:
        AssertionError: one line for each result that is wrong.
    """
    check_results(backend_results(backend, inputs), inputs, factor=factor)


def check_results(found: Results, inputs: Inputs, *, factor: float = 2.0) -> None:
    """`check_backend` for results that are already at hand."""
    truth, plain = reference64(inputs), autograd_results(inputs)
    wide = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    wrong: list[str] = []
    for name, true in truth.outputs.items():
        got = found.outputs[name]
        dtype = inputs.query.dtype if name == "output" else wide
        inner = name == "output"
        wrong += _wrong(name, got, true, plain.outputs[name], dtype, inner, factor)
    for which, true_gradients in truth.gradients.items():
        for name, true_gradient in true_gradients.items():
            label = f"{name} of {which}"
            got_gradient = found.gradients[which][name]
            assert true_gradient is not None
            if got_gradient is None:
                wrong.append(f"{label} is None")
                continue
            eager_gradient = plain.gradients[which][name]
            assert eager_gradient is not None
            wrong += _wrong(
                label, got_gradient, true_gradient, eager_gradient, inputs.query.dtype, True, factor
            )
    assert not wrong, "\n".join(wrong)


def _wrong(
    label: str,
    got: Tensor,
    true: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    heads_inside: bool,
    factor: float,
) -> list[str]:
    if got.shape != true.shape or got.dtype != dtype:
        return [f"{label} is {got.dtype} {tuple(got.shape)}, wanted {dtype} {tuple(true.shape)}"]
    if not has_layout(got, heads_inside):
        return [f"{label} {tuple(got.shape)} has strides {got.stride()}"]
    if got.numel() == 0:
        return []
    error = (got.double() - true).abs().max().item()
    allowed = factor * (plain.double() - true).abs().max().item()
    # In float64 the truth itself is rounded.
    ulps = 16 * ULPS if dtype == torch.float64 else ULPS
    allowed += ulps * torch.finfo(dtype).eps * true.abs().max().item()
    # A NaN compares false with everything, so the comparison that must hold is the one written.
    return [] if error <= allowed else [f"{label}: error {error:.3g}, allowed {allowed:.3g}"]


def has_layout(tensor: Tensor, heads_inside: bool) -> bool:
    """Whether it is contiguous, or with heads_inside a [B, H, L, D] view of contiguous [B, L, H, D].

    Strides along axes of one entry mean nothing and are free.
    """
    return (tensor.transpose(1, 2) if heads_inside else tensor).is_contiguous()


def log_sum_exp_alignment(inputs: Inputs) -> Tensor:
    """Equation 12 of docs/method.md summed as equation 5, float64 [B], without any map; w = 1."""
    inputs = inputs.double()
    assert inputs.reference_key is not None and inputs.token_weights is None

    def scores(key: Tensor) -> Tensor:
        found = torch.einsum("bhnd,bhmd->bhnm", inputs.query, key.expand(len(inputs.query), -1, -1, -1))
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
    """Every uninitialised tensor made from Python is full of NaN (integers: their largest value)."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*arguments: Any, **keywords: Any) -> Tensor:
            tensor = make(*arguments, **keywords)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

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
