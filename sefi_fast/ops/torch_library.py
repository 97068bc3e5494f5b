"""The operator's registration with torch.library: kernels, fakes, autograd and autocast."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from sefi_fast.errors import BackendError
from sefi_fast.ops import eager
from sefi_fast.ops.dispatch import choose_backend, load
from sefi_fast.ops.validation import check_gradients, check_inputs, refuse_layouts

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? reference_key, Tensor? token_weights, "
    "Tensor? key_mask, Tensor? probs_positions, bool probs_all_heads, float? scale, "
    "bool reference_grad, str? backend"
)
_TENSORS = 7
_ARGUMENTS = 11

# A compiler may lay out what it passes to an operator anew; these rely on a dense last axis.
# Older releases only know how to keep the order of the strides.
_TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)

_FORWARD = f"fused_cross_attention({_INPUTS}) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    "fused_cross_attention_backward(Tensor? grad_output, Tensor? grad_subject_loss, "
    f"Tensor? grad_attn_probs, {_INPUTS}, bool[] needs) -> Tensor[]"
)

# PyTorch keeps operators for as long as the process lives, whatever becomes of this module.
_is_first_import = not hasattr(torch.ops.sefi_fast, "fused_cross_attention")
if _is_first_import:
    _library = torch.library.Library("sefi_fast", "DEF")
    _library.define(_FORWARD, tags=_TAGS)
    _library.define(_BACKWARD, tags=_TAGS)
forward_op = torch.ops.sefi_fast.fused_cross_attention.default
backward_op = torch.ops.sefi_fast.fused_cross_attention_backward.default


def cast_for_autocast(
    query: Tensor, key: Tensor, value: Tensor, reference_key: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The four in autocast's dtype where it is on for the query's device; float64 stays."""
    device = query.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return query, key, value, reference_key
    wanted = torch.get_autocast_dtype(device)

    def cast(tensor: Any) -> Any:
        follows = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(wanted) if follows and tensor.dtype != torch.float64 else tensor

    return cast(query), cast(key), cast(value), cast(reference_key)


def _run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    probs_positions: Tensor | None,
    probs_all_heads: bool,
    scale: float | None,
    reference_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs(
        query,
        key,
        value,
        reference_key,
        token_weights,
        key_mask,
        probs_positions,
        scale,
        stored=True,
    )
    # On a CUDA device reading values would wait for it; a column too large gives zeros there.
    if probs_positions is not None and probs_positions.is_cpu and probs_positions.numel():
        largest = int(probs_positions.max())
        if largest >= key.shape[2]:
            raise ValueError(
                f"probs_positions names column {largest}, but there are {key.shape[2]} keys: give "
                f"0 to {key.shape[2] - 1}, or a negative number for a map of zeros"
            )
    name = choose_backend(query, key, value, reference_key, probs_positions, backend)
    return load(name).forward(
        query,
        key,
        value,
        reference_key,
        token_weights,
        key_mask,
        probs_positions,
        probs_all_heads=probs_all_heads,
        scale=_scale(query, scale),
    )


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[3] ** -0.5 if scale is None else scale


def _run_backward(
    grad_output: Tensor | None,
    grad_subject_loss: Tensor | None,
    grad_attn_probs: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    probs_positions: Tensor | None,
    probs_all_heads: bool,
    scale: float | None,
    reference_grad: bool,
    backend: str | None,
    needs: list[bool],
    from_autograd: bool = False,
) -> list[Tensor]:
    check_inputs(
        query,
        key,
        value,
        reference_key,
        token_weights,
        key_mask,
        probs_positions,
        scale,
        stored=True,
    )
    check_gradients(
        grad_output, grad_subject_loss, grad_attn_probs, query, reference_key, probs_positions,
        probs_all_heads, needs, stored=True, from_autograd=from_autograd,
    )  # fmt: skip
    name = choose_backend(query, key, value, reference_key, probs_positions, backend)
    grads = load(name).backward(
        grad_output,
        grad_subject_loss,
        grad_attn_probs,
        query,
        key,
        value,
        reference_key,
        token_weights,
        key_mask,
        probs_positions,
        probs_all_heads=probs_all_heads,
        scale=_scale(query, scale),
        reference_grad=reference_grad,
        needs=(needs[0], needs[1], needs[2], needs[3]),
    )
    # The registered op has no None among its results: only the wanted gradients, in order.
    return [grad for grad in grads if grad is not None]


_run_backward_of_forward = functools.partial(_run_backward, from_autograd=True)


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    probs_positions: Tensor | None,
    probs_all_heads: bool,
    scale: float | None,
    reference_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs(
        query,
        key,
        value,
        reference_key,
        token_weights,
        key_mask,
        probs_positions,
        scale,
        stored=False,
    )
    batch, heads, queries, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    columns = 0 if probs_positions is None else probs_positions.shape[1]
    shape = (batch, heads, columns, queries) if probs_all_heads else (batch, columns, queries)
    return (
        _empty_like(query),
        query.new_empty(batch, dtype=wide),
        query.new_empty(shape, dtype=wide),
    )


def _fake_backward(
    grad_output: Tensor | None,
    grad_subject_loss: Tensor | None,
    grad_attn_probs: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    probs_positions: Tensor | None,
    probs_all_heads: bool,
    scale: float | None,
    reference_grad: bool,
    backend: str | None,
    needs: list[bool],
) -> list[Tensor]:
    check_inputs(
        query,
        key,
        value,
        reference_key,
        token_weights,
        key_mask,
        probs_positions,
        scale,
        stored=False,
    )
    check_gradients(
        grad_output, grad_subject_loss, grad_attn_probs, query, reference_key, probs_positions,
        probs_all_heads, needs, stored=False,
    )  # fmt: skip
    tensors = (query, key, value, reference_key)
    wanted = zip(tensors, needs, strict=True)
    return [_empty_like(tensor) for tensor, need in wanted if need and tensor is not None]


def _empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised [B, H, L, D] as a view of [B, L, H, D], as the backends lay results out."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty(batch, length, heads, width).transpose(1, 2)


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether below autograd the dispatcher would go straight to the backend."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    for tensor in tensors:
        if tensor is not None and (
            (type(tensor) is not Tensor and type(tensor) is not Parameter)
            or not (tensor.is_cpu or tensor.is_cuda)
            or tensor.is_neg()
            or tensor._is_zerotensor()
        ):
            return False
    return True


def _below_autograd(op: Any, run: Any, arguments: Sequence[Any], tensors: Sequence[Any]) -> Any:
    # Below views too: else a result that a backend lays out as a view of its own could not be
    # changed in place, as a Function's result that is a view.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        # The dispatcher would box every argument only to find `run`, and that on cold caches.
        try:
            return run(*arguments) if _is_plain(tensors) else op(*arguments)
        except (RuntimeError, NotImplementedError):
            # Sparse and nested tensors have no strides or no shape, and PyTorch's words name none.
            refuse_layouts(*tensors)
            raise


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several, as vmap and is_grads_batched make it."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:_TENSORS])
        ctx.options = arguments[_TENSORS:]
        return _below_autograd(forward_op, _run_forward, arguments, arguments[:_TENSORS])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:4])
        _, _, reference_grad, _ = ctx.options
        needs[3] = needs[3] and reference_grad
        if (grads[0] is None and grads[1] is None and grads[2] is None) or True not in needs:
            return (None,) * _ARGUMENTS
        for grad in grads:
            if grad is not None and _is_batched(grad):
                raise RuntimeError(
                    "fused_cross_attention takes one gradient at a time: leave is_grads_batched, "
                    "vectorize and vmap out"
                )
        # Not through the dispatcher, which would only come back to this very function. The forward
        # call had its say about dtypes, whatever autocast is on now.
        with torch._C._DisableAutocast():
            arguments = (*grads, *ctx.saved_tensors, *ctx.options, needs)
            found = iter(_autograd_backward(*arguments, run=_run_backward_of_forward))
        wanted = [next(found) if need else None for need in needs]
        return (*wanted, *(None,) * (_ARGUMENTS - 4))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise RuntimeError(
            "fused_cross_attention has no forward-mode derivative of dual tensors. Call "
            "torch.func.jvp, or torch.func.jacfwd."
        )


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        tensors = arguments[: 3 + _TENSORS]
        return tuple(_below_autograd(backward_op, _run_backward, arguments, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        _refuse_second_derivative()


def _refuse_second_derivative() -> NoReturn:
    raise RuntimeError(
        "fused_cross_attention has no second derivative: differentiate it once, or write the "
        "attention plainly where a gradient of a gradient is wanted"
    )


def _nothing_to_record(tensors: tuple[Any, ...]) -> bool:
    """Whether autograd, reverse or forward, has no interest in a call with these tensors."""
    if forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return False
    return True


def _autograd_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _transformed_forward(*arguments)
    # An autograd.Function costs several microseconds even where it records nothing.
    if _nothing_to_record(arguments[:4]):
        return _below_autograd(forward_op, _run_forward, arguments, arguments[:_TENSORS])
    return _Forward.apply(*arguments)


def _transformed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    probs_positions: Tensor | None,
    probs_all_heads: bool,
    scale: float | None,
    reference_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inside torch.func's grad, vjp, jvp and jacrev: plain operations, which all of them know."""
    if backend not in (None, "eager"):
        raise BackendError(
            f"fused_cross_attention runs inside a transform of torch.func. Backend {backend!r} has "
            "no derivatives there. Pass backend=None or 'eager'."
        )
    check_inputs(
        query,
        key,
        value,
        reference_key,
        token_weights,
        key_mask,
        probs_positions,
        scale,
        stored=False,
    )
    return eager.forward(
        query,
        key,
        value,
        reference_key,
        token_weights,
        key_mask,
        probs_positions,
        probs_all_heads=probs_all_heads,
        scale=_scale(query, scale),
        reference_grad=reference_grad,
    )


def _autograd_backward(*arguments: Any, run: Any = _run_backward) -> list[Tensor]:
    if _nothing_to_record(arguments[: 3 + _TENSORS]):
        tensors = arguments[: 3 + _TENSORS]
        return _below_autograd(backward_op, run, arguments, tensors)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        _refuse_second_derivative()
    return list(_Backward.apply(*arguments))


# Without these, autocast would reach the plain operations inside a backend.
def _autocast_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    cast = cast_for_autocast(*arguments[:4])
    with torch._C._DisableAutocast():
        return forward_op(*cast, *arguments[4:])


def _autocast_backward(*arguments: Any) -> list[Tensor]:
    with torch._C._DisableAutocast():
        return backward_op(*arguments)


def _register() -> None:
    names = ("fused_cross_attention", "fused_cross_attention_backward")
    kernels = (
        (names[0], _run_forward, _autograd_forward, _autocast_forward, _fake_forward),
        (names[1], _run_backward, _autograd_backward, _autocast_backward, _fake_backward),
    )
    for name, run, autograd, autocast, fake in kernels:
        _library.impl(name, run, "CompositeExplicitAutograd")
        _library.impl(name, autograd, "Autograd")
        for device in ("CPU", "CUDA", "MPS", "XPU"):
            _library.impl(name, autocast, f"Autocast{device}")
        torch.library.register_fake(f"sefi_fast::{name}", fake, lib=_library)


if _is_first_import:
    _register()
    vars(torch.ops.sefi_fast)["first_import"] = globals()
elif torch._C.parse_schema(f"sefi_fast::{_FORWARD}") != forward_op._schema:
    raise ImportError(
        "This process has imported another version of sefi_fast. A process can have one. "
        "Restart Python."
    )
else:
    # The operators call the first import's kernels, which find this module's functions there.
    torch.ops.sefi_fast.first_import.update(globals())
