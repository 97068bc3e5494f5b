"""What stands in a masked key or value has no say, be it no number at all."""

from __future__ import annotations

import pytest
import torch
from ops.oracle import GRADIENTS, make_inputs, operator_results

from sefi_fast.ops import available_backends

BACKENDS = [name for name, reason in available_backends().items() if reason is None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["key", "value", "reference_key"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("keys", [7, 77])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_number_behind_the_mask_reaches_a_result(backend, keys, bad, name):
    device = DEVICE if backend in ("triton", "cuda") else "cpu"
    inputs = make_inputs(1, 2, 9, keys, 16, mask=True, tokens=1, reference_grad=True, device=device)
    hidden = ~inputs.key_mask[0]
    assert hidden.any() and not hidden.all()
    wanted = operator_results(inputs, backend)
    getattr(inputs, name)[:, :, hidden] = bad
    found = operator_results(inputs, backend)
    for output, value in found.outputs.items():
        assert torch.equal(value, wanted.outputs[output]), output
    for which, gradients in found.gradients.items():
        for gradient in GRADIENTS:
            value, other = gradients[gradient], wanted.gradients[which][gradient]
            assert value is other is None or torch.equal(value, other), (which, gradient)
