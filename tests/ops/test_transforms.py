"""The operator inside torch.func's transforms: the eager backend's results, or an error."""

from __future__ import annotations

import pytest
import torch
from ops.inputs import make_inputs
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from sefi_fast import fused_cross_attention
from sefi_fast.errors import BackendError
from sefi_fast.ops import torch_library

KINDS = {
    "plain": {"reference": False},
    "everything": {"weights": True, "mask": True, "tokens": 2, "reference_grad": True},
    "reference held fixed": {"broadcast_reference": True},
}


def _loss(inputs, query=None, key=None, **options):
    result = fused_cross_attention(
        inputs.query if query is None else query,
        inputs.key if key is None else key,
        inputs.value,
        **inputs.keywords() | options,
    )
    pairs = zip(result, inputs.grads, strict=True)
    return sum((output * weight).sum() for output, weight in pairs)


def _gradient(inputs, query):
    leaf = query.clone().requires_grad_()
    _loss(inputs, leaf).backward()
    return leaf.grad


@pytest.fixture(params=KINDS)
def inputs(request):
    return make_inputs(2, 2, 5, 7, 8, **KINDS[request.param])


WAYS = {
    "grad": lambda f, x, wanted: (grad(f)(x), wanted(x)),
    "vjp": lambda f, x, wanted: (vjp(f, x)[1](torch.ones(()))[0], wanted(x)),
    "jacrev": lambda f, x, wanted: (jacrev(f)(x), wanted(x)),
    "jvp": lambda f, x, wanted: (jvp(f, (x,), (x,))[1], (wanted(x) * x).sum()),
    "jacfwd": lambda f, x, wanted: (
        jacfwd(lambda s: f(s * x))(torch.ones(())),
        (wanted(x) * x).sum(),
    ),
    "vmap": lambda f, x, wanted: (vmap(f)(_three(x)), torch.stack([f(y) for y in _three(x)])),
    "vmap of grad": lambda f, x, wanted: (
        vmap(grad(f))(_three(x)),
        torch.stack([wanted(y) for y in _three(x)]),
    ),
    "grad of vmap": lambda f, x, wanted: (
        grad(lambda xs: vmap(f)(xs).sum())(_three(x)),
        torch.stack([wanted(y) for y in _three(x)]),
    ),
    "compiled grad": lambda f, x, wanted: (
        torch.compile(grad(f), backend="aot_eager")(x),
        wanted(x),
    ),
}


def _three(x):
    return torch.stack([x, -x, 2 * x])


@pytest.mark.parametrize("way", WAYS)
def test_transforms_give_the_numbers_of_autograd(inputs, way):
    torch._dynamo.reset()
    found, wanted = WAYS[way](
        lambda query: _loss(inputs, query), inputs.query, lambda query: _gradient(inputs, query)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_plain_operations():
    inputs = make_inputs(2, 2, 5, 7, 8, mask=True, tokens=2, reference_grad=True).double()

    def along(s):
        return _loss(inputs, s * inputs.query)

    one, step = torch.ones((), dtype=torch.float64), 1e-4
    wanted = (grad(along)(one + step) - grad(along)(one - step)) / (2 * step)
    for found in (hessian(along)(one), grad(grad(along))(one)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_samples_of_a_batch_have_gradients_each(inputs):
    """vmap over keys that differ, as gradients by sample take them."""
    keys = torch.stack([inputs.key, 2 * inputs.key])
    found = vmap(grad(lambda key: _loss(inputs, key=key)))(keys)
    for one, key in zip(found, keys, strict=True):
        torch.testing.assert_close(one, grad(lambda key: _loss(inputs, key=key))(key))


def test_a_module_called_with_other_weights(inputs):
    layer = torch.nn.Linear(8, 8, bias=False)

    def loss(weights):
        return _loss(inputs, functional_call(layer, weights, (inputs.query,)))

    found = grad(loss)({"weight": layer.weight.detach()})["weight"]
    _loss(inputs, layer(inputs.query)).backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-4, atol=1e-4)


def test_wrong_shapes_are_told_inside_a_transform(inputs):
    with pytest.raises(ValueError, match="key has shape"):
        grad(lambda query: _loss(inputs, query))(inputs.query[:, :1])


def test_a_backend_asked_for_by_name_is_refused(inputs):
    with pytest.raises(BackendError, match="fused_cross_attention runs inside a transform"):
        grad(lambda query: _loss(inputs, query, backend="cpu"))(inputs.query)


def test_the_advice_about_dual_tensors_works(inputs):
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="fused_cross_attention.*Call torch.func.jvp"),
    ):
        _loss(inputs, forward_ad.make_dual(inputs.query, inputs.query))
    jvp(lambda query: _loss(inputs, query), (inputs.query,), (inputs.query,))


def test_the_backward_op_has_no_derivative_inside_a_transform(inputs):
    def loss(grad_output):
        options = (inputs.probs_all_heads, None, False, None, [True, False, False, False])
        return torch_library.backward_op(grad_output, None, None, *inputs.tensors, *options)[
            0
        ].sum()

    with pytest.raises(RuntimeError, match="fused_cross_attention has no second derivative"):
        grad(loss)(inputs.grad_output)
