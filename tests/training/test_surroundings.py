"""A seed gives one run, whatever PyTorch's global settings are; and these stay as they were."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

import sefi_fast
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training import train, train_many

IMAGE = sefi_fast.bundled_subject_image()
FAST = {
    "class_word": CLASS_WORD,
    "steps": 2,
    "batch_size": 2,
    "stages": 2,
    "progress": False,
    "validation_prompts": ("a {}",),
    "validation_every": 2,
    "validation_steps": 1,
}


@contextmanager
def put(setter, value, usual):
    setter(value)
    try:
        yield
    finally:
        setter(usual)


SURROUNDINGS = {
    "float64": lambda: put(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: put(torch.set_default_dtype, torch.float16, torch.float32),
    "bfloat16": lambda: put(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device meta": lambda: put(torch.set_default_device, "meta", None),
    "default device cpu": lambda: put(torch.set_default_device, "cpu", None),
    "with device meta": lambda: torch.device("meta"),
    "deterministic": lambda: put(torch.use_deterministic_algorithms, True, False),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another seed": lambda: torch.random.fork_rng(devices=[]),
}


@pytest.fixture(scope="module")
def pipe():
    return sefi_fast.load_pipeline(None)


@pytest.fixture(scope="module")
def usual(pipe):
    return train(IMAGE, model=pipe, **FAST)


def assert_same(found, wanted):
    for ours, theirs in zip(found.tokens, wanted.tokens, strict=True):
        assert ours.dtype == torch.float32 and ours.device.type == "cpu"
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found.history.loss == pytest.approx(wanted.history.loss, rel=1e-5)
    images = [np.asarray(one.history.validation[0][1][0], int) for one in (found, wanted)]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_same_seed_gives_the_same_run(pipe, usual, name):
    with SURROUNDINGS[name]():
        if name == "another seed":
            torch.manual_seed(1234)
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        found = train(IMAGE, model=pipe, **FAST)
        assert (torch.get_default_dtype(), torch.get_default_device()) == (dtype, device)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert np.random.get_state()[1].tolist() == state[1]
    assert_same(found, usual)


@pytest.mark.parametrize("name", ["float64", "with device meta"])
def test_the_model_is_loaded_alike(tmp_path, usual, name):
    with SURROUNDINGS[name]():
        (result,) = train_many([IMAGE], output=tmp_path, **FAST)
    assert_same(result.subject, usual)


def test_a_mask_and_free_rows_under_another_default_dtype(pipe):
    settings = {**FAST, "attention_loss": "mask", "module": "free", "schedule": "linear"}
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), dtype=bool)
    mask[20:60, 20:60] = True
    wanted = train(image, model=pipe, mask=mask, **settings)
    with SURROUNDINGS["float64"]():
        assert_same(train(image, model=pipe, mask=mask, **settings), wanted)


def test_two_text_encoders_under_another_default_dtype(sdxl_pipeline):
    settings = {"class_word": "cat", "steps": 2, "batch_size": 1, "resolution": 64}
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    wanted = train(image, model=sdxl_pipeline, progress=False, **settings)
    with SURROUNDINGS["float64"](), SURROUNDINGS["with device meta"]():
        found = train(image, model=sdxl_pipeline, progress=False, **settings)
    for ours, theirs in zip(found.tokens, wanted.tokens, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
