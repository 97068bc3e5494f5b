"""LoRA weights loaded, scaled, fused and unloaded while subjects are attached."""

from __future__ import annotations

import pytest
import torch
from pipelines.features import load_lora
from pipelines.sampling import draw, subject_for

from sefi_fast import attach, detach

pytest.importorskip("peft")
CLOSE = {"rtol": 0, "atol": 1e-3}


@pytest.fixture(params=["sd15_pipeline", "sdxl_pipeline"])
def pipe(request):
    return request.getfixturevalue(request.param)


def cat(pipe) -> torch.Tensor:
    return draw(pipe, "a photo of a cat", num_inference_steps=2)


def subject(pipe) -> torch.Tensor:
    return draw(pipe, "a photo of a <it>", num_inference_steps=2)


def test_loading_and_unloading_while_attached(pipe):
    bare = cat(pipe)
    load_lora(pipe)
    with_lora = cat(pipe)
    assert (with_lora - bare).abs().max() > 1e-2
    pipe.unload_lora_weights()
    attach(pipe, subject_for(pipe, distance=0))
    torch.testing.assert_close(subject(pipe), bare, **CLOSE)
    load_lora(pipe)
    torch.testing.assert_close(subject(pipe), with_lora, **CLOSE)
    pipe.unload_lora_weights()
    torch.testing.assert_close(subject(pipe), bare, **CLOSE)
    detach(pipe)
    torch.testing.assert_close(cat(pipe), bare, **CLOSE)


def test_scales_and_fusing_while_attached(pipe):
    load_lora(pipe)
    (name,) = pipe.get_list_adapters()["unet"]
    pipe.set_adapters(name, 0.3)
    weak = cat(pipe)
    pipe.set_adapters(name, 1.0)
    strong = cat(pipe)
    attach(pipe, subject_for(pipe, distance=0))
    torch.testing.assert_close(subject(pipe), strong, **CLOSE)
    pipe.set_adapters(name, 0.3)
    torch.testing.assert_close(subject(pipe), weak, **CLOSE)
    pipe.set_adapters(name, 1.0)
    pipe.fuse_lora()
    torch.testing.assert_close(subject(pipe), strong, **CLOSE)
    pipe.unfuse_lora()
    pipe.disable_lora()
    detach(pipe)
    plain = cat(pipe)
    attach(pipe, subject_for(pipe, distance=0))
    torch.testing.assert_close(subject(pipe), plain, **CLOSE)
    assert (plain - strong).abs().max() > 1e-2
