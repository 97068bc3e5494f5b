"""The operator's registration with torch.library: kernels, fakes, autograd and autocast.

The parts of `torch._C` used here have no public equivalent of their cost. A public
`torch.autocast(enabled=False)` takes 17 μs where `_DisableAutocast` takes 0.4. Nothing public goes
below autograd and view tracking, or names the active transforms and dispatch modes.
"""

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
from sefi_fast.ops.inputs import (
    AttentionInputs,
    Options,
    OutputGrads,
    Outputs,
    check_gradients,
    check_inputs,
    check_positions,
    empty_result,
    refuse_layouts,
    wide_dtype,
)

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? reference_key, Tensor? token_weights, "
    "Tensor? key_mask, Tensor? probs_positions, bool probs_all_heads, float? scale, "
    "bool reference_grad, str? backend"
)
_SCHEMAS = (
    f"fused_cross_attention({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    "fused_cross_attention_backward(Tensor? grad_output, Tensor? grad_subject_loss, "
    f"Tensor? grad_attn_probs, {_INPUTS}, bool[] needs) -> Tensor[]",
)
_GRADS = len(OutputGrads._fields)
_TENSORS = len(AttentionInputs._fields)
_NOT_TENSORS = 4

# A compiler may change the layout of an operator's arguments; the kernels need a dense last axis.
_TAGS = (torch.Tag.needs_exact_strides,)

_functorch = torch._C._functorch

# PyTorch keeps operators for as long as the process lives, whatever becomes of this module.
_is_first_import = not hasattr(torch.ops.sefi_fast, "fused_cross_attention")
if _is_first_import:
    _library = torch.library.Library("sefi_fast", "DEF")
    for _schema in _SCHEMAS:
        _library.define(_schema, tags=_TAGS)
forward_op = torch.ops.sefi_fast.fused_cross_attention.default
backward_op = torch.ops.sefi_fast.fused_cross_attention_backward.default


def _run_forward(*arguments: Any) -> Outputs:
    inputs = AttentionInputs(*arguments[:_TENSORS])
    probs_all_heads, scale, reference_grad, backend = arguments[_TENSORS:]
    check_inputs(inputs, scale, stored=True)
    check_positions(inputs)
    if scale is None:
        scale = inputs.query.shape[3] ** -0.5
    options = Options(probs_all_heads, scale, reference_grad)
    return load(choose_backend(inputs, backend)).forward(inputs, options)


def _run_backward(*arguments: Any, from_autograd: bool = False) -> list[Tensor]:
    grads = OutputGrads(*arguments[:_GRADS])
    inputs = AttentionInputs(*arguments[_GRADS : _GRADS + _TENSORS])
    probs_all_heads, scale, reference_grad, backend, needs = arguments[_GRADS + _TENSORS :]
    check_inputs(inputs, scale, stored=True)
    check_gradients(grads, inputs, probs_all_heads, needs, stored=True, from_autograd=from_autograd)
    if scale is None:
        scale = inputs.query.shape[3] ** -0.5
    options = Options(probs_all_heads, scale, reference_grad, tuple(needs))
    found = load(choose_backend(inputs, backend)).backward(grads, inputs, options)
    # The registered op has no None among its results: only the wanted gradients, in order.
    return [grad for grad in found if grad is not None]


_run_backward_of_forward = functools.partial(_run_backward, from_autograd=True)


def _fake_forward(*arguments: Any) -> Outputs:
    inputs = AttentionInputs(*arguments[:_TENSORS])
    probs_all_heads, scale, _, _ = arguments[_TENSORS:]
    check_inputs(inputs, scale, stored=False)
    query = inputs.query
    wide = wide_dtype(query.dtype)
    return (
        empty_result(query),
        query.new_empty(query.shape[0], dtype=wide),
        query.new_empty(inputs.probs_shape(probs_all_heads), dtype=wide),
    )


def _fake_backward(*arguments: Any) -> list[Tensor]:
    grads = OutputGrads(*arguments[:_GRADS])
    inputs = AttentionInputs(*arguments[_GRADS : _GRADS + _TENSORS])
    probs_all_heads, scale, _, _, needs = arguments[_GRADS + _TENSORS :]
    check_inputs(inputs, scale, stored=False)
    check_gradients(grads, inputs, probs_all_heads, needs, stored=False)
    wanted = zip(inputs[:4], needs, strict=True)
    return [empty_result(tensor) for tensor, need in wanted if need and tensor is not None]


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether the dispatcher, below autograd, would go straight to the backend."""
    if torch._C._len_torch_dispatch_stack() or _functorch.peek_interpreter_stack():
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
    # Below views too: a Function's result that is a view could not be changed in place.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        # The dispatcher would box every argument only to find `run`, and that on cold caches.
        try:
            return run(*arguments) if _is_plain(tensors) else op(*arguments)
        except (RuntimeError, NotImplementedError):
            # Sparse and nested tensors have no strides or no shape; PyTorch's message names none.
            refuse_layouts(*tensors)
            raise


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
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
            return (None,) * (_TENSORS + _NOT_TENSORS)
        for grad in grads:
            # vmap and is_grads_batched pass tensors that are batches of gradients.
            if grad is not None and (
                _functorch.is_legacy_batchedtensor(grad) or _functorch.is_batchedtensor(grad)
            ):
                raise RuntimeError(
                    "fused_cross_attention takes one gradient at a time: leave is_grads_batched, "
                    "vectorize and vmap out"
                )
        # Not through the dispatcher, which would only come back to this very function. The forward
        # call decided the dtypes, whatever autocast is on now.
        with torch._C._DisableAutocast():
            arguments = (*grads, *ctx.saved_tensors, *ctx.options, needs)
            found = iter(_autograd_backward(*arguments, run=_run_backward_of_forward))
        wanted = [next(found) if need else None for need in needs]
        return (*wanted, *(None,) * (_TENSORS + _NOT_TENSORS - 4))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise RuntimeError(
            "fused_cross_attention has no forward-mode derivative of dual tensors. Call "
            "torch.func.jvp, or torch.func.jacfwd."
        )


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        tensors = arguments[: _GRADS + _TENSORS]
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
    """Return whether autograd, reverse or forward, records nothing of these tensors."""
    if forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return False
    return True


def _autograd_forward(*arguments: Any) -> Any:
    if _functorch.peek_interpreter_stack() is not None:
        return _transformed_forward(*arguments)
    # An autograd.Function costs several microseconds even where it records nothing.
    if _nothing_to_record(arguments[:4]):
        return _below_autograd(forward_op, _run_forward, arguments, arguments[:_TENSORS])
    return _Forward.apply(*arguments)


def _transformed_forward(*arguments: Any) -> Outputs:
    """Run plain operations, which torch.func's grad, vjp, jvp and jacrev can differentiate."""
    inputs = AttentionInputs(*arguments[:_TENSORS])
    probs_all_heads, scale, reference_grad, backend = arguments[_TENSORS:]
    if backend not in (None, "eager"):
        raise BackendError(
            f"fused_cross_attention runs inside a transform of torch.func. Backend {backend!r} has "
            "no derivatives there. Pass backend=None or 'eager'."
        )
    check_inputs(inputs, scale, stored=False)
    if scale is None:
        scale = inputs.query.shape[3] ** -0.5
    return eager.forward(inputs, Options(probs_all_heads, scale, reference_grad))


def _autograd_backward(*arguments: Any, run: Any = _run_backward) -> Any:
    tensors = arguments[: _GRADS + _TENSORS]
    if _nothing_to_record(tensors):
        return _below_autograd(backward_op, run, arguments, tensors)
    if _functorch.peek_interpreter_stack() is not None:
        _refuse_second_derivative()
    return list(_Backward.apply(*arguments))


def _cast_for_autocast(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Return the four in autocast's dtype if it is on for the query's device; float64 stays."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tuple(tensors)
    wanted = torch.get_autocast_dtype(device)

    def cast(tensor: Any) -> Any:
        follows = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(wanted) if follows and tensor.dtype != torch.float64 else tensor

    return tuple(map(cast, tensors))


# Without these, autocast would reach the plain operations inside a backend.
def _autocast_forward(*arguments: Any) -> Any:
    cast = _cast_for_autocast(arguments[:4])
    with torch._C._DisableAutocast():
        return forward_op(*cast, *arguments[4:])


def _autocast_backward(*arguments: Any) -> Any:
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
    vars(torch.ops.sefi_fast).update(first_import=globals(), schemas=_SCHEMAS)
elif vars(torch.ops.sefi_fast)["schemas"] != _SCHEMAS:
    raise ImportError(
        "This process has imported another version of sefi_fast. A process can have one. "
        "Restart Python."
    )
else:
    # The operators call the first import's kernels, which find this module's functions there.
    vars(torch.ops.sefi_fast)["first_import"].update(globals())
