"""Options that trade time for memory or warm-up change no number: compile, low_memory.

The compiled U-Net takes a minute: run it with `pytest -m long tests/training/test_step_options.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import skimage
import torch

from sefi_fast.training import TrainConfig, train
from sefi_fast.training.base_model import Source, checkpointed, frozen

PHOTO = Path(skimage.__file__).parent / "data" / "chelsea.png"
FAST = {"steps": 3, "batch_size": 2, "resolution": 64, "progress": False, "weight_lambda": 50.0}


def function_of(unet):
    return [
        (part.gradient_checkpointing, vars(part).get("_gradient_checkpointing_func"))
        for part in unet.modules()
        if hasattr(part, "gradient_checkpointing")
    ]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_checkpointing_is_put_back_as_it_was(sd15_pipeline, own, wanted):
    unet = sd15_pipeline.unet
    if own:
        unet.enable_gradient_checkpointing()
    before = function_of(unet)
    with checkpointed(unet, wanted):
        assert unet.is_gradient_checkpointing == (own or wanted)
        if own or wanted:
            functions = {function.__name__ for _, function in function_of(unet)}
            assert functions == {"_recompute"}
    assert function_of(unet) == before


def test_low_memory_recomputes_and_changes_no_number(sd15_pipeline):
    plain = train(PHOTO, model=sd15_pipeline, class_word="cat", **FAST)
    seen = []
    layer = sd15_pipeline.unet.up_blocks[1].resnets[0]
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(None))
    low = train(PHOTO, model=sd15_pipeline, class_word="cat", low_memory=True, **FAST)
    handle.remove()
    assert len(seen) == 2 * FAST["steps"]
    assert low.history.loss == plain.history.loss
    assert torch.equal(low.tokens[0], plain.tokens[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_low_memory_takes_the_vae_off_the_device(sd15_pipeline):
    pipe = sd15_pipeline.to("cuda")
    source = Source(pipe, "random", None, torch.device("cuda"), torch.float32, False, "")
    with frozen(source, TrainConfig(low_memory=True)):
        assert pipe.vae.device.type == "cpu"
        assert pipe.unet.device.type == "cuda"
    assert pipe.vae.device.type == "cuda"


@pytest.mark.long
def test_a_compiled_unet_trains_alike(sd15_pipeline):
    plain = train(PHOTO, model=sd15_pipeline, class_word="cat", **FAST)
    compiled = train(PHOTO, model=sd15_pipeline, class_word="cat", compile=True, **FAST)
    assert compiled.history.loss == pytest.approx(plain.history.loss, rel=1e-4)
    assert compiled.history.subject_loss == pytest.approx(
        plain.history.subject_loss, rel=0.02, abs=1e-9
    )


def test_the_compiler_sees_the_whole_unet(sd15_pipeline, monkeypatch):
    honest = torch.compile

    def traced(function, **settings):
        return honest(function, backend="eager", fullgraph=True, **settings)

    plain = train(PHOTO, model=sd15_pipeline, class_word="cat", **FAST)
    monkeypatch.setattr(torch, "compile", traced)
    # Other tests have compiled the same function for models of other shapes.
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = train(PHOTO, model=sd15_pipeline, class_word="cat", compile=True, **FAST)
    assert compiled.history.loss == pytest.approx(plain.history.loss, rel=1e-6)
    assert torch.allclose(compiled.tokens[0], plain.tokens[0], atol=1e-5)
