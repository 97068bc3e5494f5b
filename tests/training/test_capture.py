"""Which runs capture their step, and when a device has nothing but errors left."""

from __future__ import annotations

import pytest
import torch

from sefi_fast.training.engine import is_lost, wants_capture

CPU = torch.device("cpu")


def test_captures_are_cuda_alone():
    assert not wants_capture("auto", CPU)
    assert wants_capture("auto", torch.device("cuda"))
    assert not wants_capture("never", torch.device("cuda"))
    with pytest.raises(ValueError, match="CUDA only"):
        wants_capture("always", CPU)


def test_a_device_that_answers_with_an_error_is_lost(monkeypatch):
    def answer(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not is_lost(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", answer)
    assert is_lost(torch.device("cuda")) and not is_lost(CPU)
