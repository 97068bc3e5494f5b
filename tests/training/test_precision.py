"""The number format and the device of a run, where they are left to the library."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sefi_fast.training.base_model import choose_device, choose_dtype

CUDA = torch.device("cuda", 1)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_taken_where_the_device_itself_has_it(monkeypatch, native):
    asked = []

    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: asked.append(device) or contextlib.nullcontext()
    )
    wanted = torch.bfloat16 if native else torch.float16
    assert choose_dtype("auto", CUDA, torch.float32) == wanted
    assert asked == [CUDA]


def test_a_half_precision_model_keeps_its_own_and_a_cpu_takes_float32():
    assert choose_dtype("auto", CUDA, torch.float16) == torch.float16
    assert choose_dtype("auto", torch.device("cpu"), torch.float16) == torch.float32


def test_devices_that_training_does_not_run_on_are_refused():
    for device in ("meta", None):
        with pytest.raises(ValueError, match="on the CPU and on CUDA, not on 'meta'"):
            choose_device(device, torch.device("meta"))
