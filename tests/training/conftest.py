"""Fixtures of the tests of training: a pipeline of each family, the bundled one, a photo."""

from __future__ import annotations

import pytest
from training.shared import PHOTO, Family

import sefi_fast
from sefi_fast.training import load_image
from sefi_fast.training import step as step_module


@pytest.fixture(params=["sd15", "sdxl"])
def family(request):
    return Family(request.getfixturevalue(f"{request.param}_pipeline"))


@pytest.fixture(scope="module")
def bundled():
    """The bundled pipeline; tests must leave it as it is."""
    return sefi_fast.load_pipeline(None)


@pytest.fixture
def photo():
    return load_image(PHOTO)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "me.safetensors"


@pytest.fixture
def spoil(monkeypatch):
    """Let the noise loss of some steps be `value`: in all samples, or in those of one subject."""
    honest = step_module.noise_loss

    def spoil(bad_steps, value=float("nan"), samples=slice(None)):
        calls = iter(range(1000))

        def noise_loss(prediction, target):
            loss = honest(prediction, target)
            if next(calls) in bad_steps:
                loss = loss.clone()
                loss[samples] = loss[samples] * value
            return loss

        monkeypatch.setattr(step_module, "noise_loss", noise_loss)

    return spoil
