"""A frozen pipeline is restored, also when training cannot start."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from training.shared import BUNDLED_IMAGE as IMAGE
from training.shared import QUICK, state_of

import sefi_fast
from sefi_fast.errors import ModelError
from sefi_fast.training import TrainConfig, base_model, engine, subject_state, train
from sefi_fast.training.base_model import choose_device, choose_dtype, training_session

FAST = {**QUICK, "steps": 1}


@pytest.fixture(scope="module")
def pipe():
    """A pipeline with flags, modes, formats and layouts of all kinds."""
    pipe = sefi_fast.load_pipeline(None)
    for number, parameter in enumerate(pipe.unet.parameters()):
        parameter.requires_grad_(number % 3 == 0)
    pipe.text_encoder.requires_grad_(False)
    pipe.vae.half()
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.unet.down_blocks[0].to(memory_format=torch.channels_last)
    pipe.text_encoder.to(torch.bfloat16)
    return pipe


class Unforeseen(BaseException):
    pass


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (base_model, "checkpointed"),
        (subject_state, "encode_image"),
        (engine, "TrainingProcessors"),
        (engine.Engine, "step"),
        (base_model, "_is_channels_last"),
    ],
)
def test_any_error_restores_the_pipeline(pipe, monkeypatch, module, name):
    before = state_of(pipe)
    calls = []
    honest = getattr(module, name)

    def fail(*arguments, **keywords):
        calls.append(name)
        # In the middle of a module's tensors, where it is called for each.
        if name != "_is_channels_last" or len(calls) == 50:
            raise Unforeseen
        return honest(*arguments, **keywords)

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(Unforeseen):
        train(IMAGE, model=pipe, gradient_checkpointing=True, **FAST)
    assert calls
    monkeypatch.undo()
    assert state_of(pipe) == before


def test_an_interrupt_at_any_line(pipe):
    """Ctrl-C in the middle of the set-up: at lines spread over all of it."""
    before = state_of(pipe)
    files = {base_model.__file__}
    config = TrainConfig(gradient_checkpointing=True)

    def run_until(stop):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if frame.f_code.co_filename not in files:
                return None
            count += event == "line"
            if count == stop:
                raise KeyboardInterrupt
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            with training_session(pipe, config):
                sys.settrace(previous)
                return count
        except KeyboardInterrupt:
            return stop
        finally:
            sys.settrace(previous)

    lines = run_until(-1)
    assert lines > 1000
    for stop in [*range(1, lines, lines // 15), lines]:
        assert run_until(stop) == stop
        assert state_of(pipe) == before, stop


def test_a_tensor_that_cannot_be_put_back_costs_no_other_one(pipe, monkeypatch):
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    modes = [part.training for part in pipe.unet.modules()]
    honest, fails = base_model._move, []

    def move(*arguments):
        if fails:
            raise fails.pop()
        honest(*arguments)

    monkeypatch.setattr(base_model, "_move", move)
    with pytest.raises(MemoryError), training_session(pipe, TrainConfig()):
        fails.append(MemoryError())
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == flags
    assert [part.training for part in pipe.unet.modules()] == modes


def test_weights_made_in_inference_mode_are_refused_and_stay(tmp_path):
    with torch.inference_mode():
        pipe = sefi_fast.load_pipeline(None)
    before = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    with pytest.raises(ModelError, match=r"torch\.no_grad\(\)"):
        train(IMAGE, model=pipe, **FAST)
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == before
    # What the message advises.
    with torch.no_grad():
        pipe = sefi_fast.load_pipeline(None)
    assert len(train(IMAGE, model=pipe, **FAST).history.loss) == 1


CUDA = torch.device("cuda", 1)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_taken_where_the_device_itself_has_it(monkeypatch, native):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation
    )
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: asked.append(device) or contextlib.nullcontext()
    )
    wanted = torch.bfloat16 if native else torch.float16
    assert choose_dtype("auto", CUDA, torch.float32) == wanted and asked == [CUDA]


def test_a_half_precision_model_keeps_its_own_and_a_cpu_takes_float32():
    assert choose_dtype("auto", CUDA, torch.float16) == torch.float16
    assert choose_dtype("auto", torch.device("cpu"), torch.float16) == torch.float32


@pytest.mark.parametrize("device", ["meta", None])
def test_devices_that_training_does_not_run_on_are_refused(device):
    with pytest.raises(ValueError, match="not on 'meta'"):
        choose_device(device, torch.device("meta"))
