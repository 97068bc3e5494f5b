"""Traces and regions restore the pipeline, leave other calls alone, and refuse each other."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from models import make_controlnet
from pipelines.sampling import assert_close, run_threads, sample, state_of, twin

from sefi_fast import attach, detach, regions, trace
from sefi_fast.attention.processor import SeFiAttnProcessor
from sefi_fast.errors import ModelError, PromptError

WATCHES = {
    "trace": lambda pipe, word="cat": trace(pipe, word),
    "regions": lambda pipe, word="cat": regions(pipe, {f"a bear, a {word}": (0, 0, 1, 0.5)}),
}


@pytest.fixture(params=WATCHES)
def watch(request):
    return WATCHES[request.param]


def fail(*args):
    raise RuntimeError("stop")


@pytest.mark.parametrize("attached", [False, True])
def test_everything_is_restored_on_exit_and_on_errors(pipe, make_subject, watch, attached):
    sample(pipe, "a cat")  # A call leaves its settings on the pipeline.
    if attached:
        attach(pipe, make_subject())
    before = state_of(pipe)
    with watch(pipe):
        sample(pipe, "a cat")
    assert state_of(pipe) == before
    for callback in (None, fail):
        with pytest.raises(RuntimeError, match="stop"), watch(pipe):
            sample(pipe, "a cat", callback_on_step_end=callback)
            fail()
        assert state_of(pipe) == before


def test_attaching_and_detaching_meanwhile(pipe, make_subject, watch):
    sample(pipe, "a cat")
    before = state_of(pipe)
    with watch(pipe, "<it>") as found:
        attach(pipe, make_subject())
        sample(pipe, "a <it>")
    assert found is None or found.maps["<it>"].shape == (1, 16, 16)
    attached = state_of(pipe)
    with watch(pipe) as found:
        detach(pipe)
        sample(pipe, "a cat")
    assert found is None or found.maps["cat"].any()
    assert attached != state_of(pipe) == before


@pytest.mark.parametrize("kind", [AttnProcessor2_0, SlicedAttnProcessor, SeFiAttnProcessor])
def test_processors_are_given_back(pipe, make_subject, watch, kind):
    chosen = kind(1) if kind is SlicedAttnProcessor else kind()
    pipe.unet.set_attn_processor(chosen)
    for _ in range(2):
        with watch(pipe):
            sample(pipe, "a cat", num_inference_steps=1)
        assert set(pipe.unet.attn_processors.values()) == {chosen}
        attach(pipe, make_subject())


def test_other_threads_and_pipelines_go_on_undisturbed(pipe, watch):
    other = twin(pipe)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor(300), torch.randn(1, 77, 48)
    with torch.no_grad():
        bare = pipe.unet(*inputs).sample, sample(other, "a dog on the hill")
    results = []

    @torch.no_grad()
    def call_unet():
        results.append(pipe.unet(*inputs).sample)

    def call_in_a_thread(pipe, step, timestep, tensors):
        run_threads(call_unet)
        return tensors

    with watch(pipe):
        expected = sample(pipe, "a cat")
    with watch(pipe) as found:
        assert_close(sample(pipe, "a cat", callback_on_step_end=call_in_a_thread), expected)
        maps = found and found.maps["cat"]
        assert_close(sample(other, "a dog on the hill"), bare[1])
        assert found is None or torch.equal(found.maps["cat"], maps)
    assert len(results) == 4
    for result in results:
        assert_close(result, bare[0], 1e-5)


@pytest.mark.parametrize("put", ["attach", *WATCHES])
def test_hooks_bear_a_call_without_keywords(pipe, make_subject, put):
    # So torch calls them while another thread registers or removes them.
    with ExitStack() as stack:
        if put == "attach":
            attach(pipe, make_subject())
        else:
            stack.enter_context(WATCHES[put](pipe))
            sample(pipe, "a cat", num_inference_steps=1)
        for model in (pipe.unet, pipe.text_encoder):
            for hook in model._forward_pre_hooks.values():
                assert hook(model, (torch.zeros(1, 2, dtype=torch.int64),)) is None
            assert not model._forward_hooks_with_kwargs
            for hook in model._forward_hooks.values():
                assert hook(model, (), None) is None


@pytest.mark.parametrize(("name", "part"), [("trace", None), ("trace", "unet"), ("regions", None)])
@pytest.mark.parametrize("copied_by", [copy.deepcopy, pickle.dumps])
def test_a_pipeline_is_not_copied_meanwhile(pipe, copied_by, name, part):
    with WATCHES[name](pipe), pytest.raises(ModelError, match="Leave their with block"):
        copied_by(getattr(pipe, part) if part else pipe)
    assert copied_by(pipe) is not pipe


def test_prompts_must_be_words(pipe, watch):
    with pytest.raises(PromptError, match="give (it|them) as text"), watch(pipe):
        sample(pipe, None, prompt_embeds=torch.zeros(1, 77, 48))


@pytest.mark.parametrize("inner", WATCHES.values(), ids=WATCHES)
def test_a_second_one_within_the_first_is_refused(pipe, watch, inner):
    before = state_of(pipe)
    with watch(pipe), pytest.raises(ValueError, match="already run"), inner(pipe):
        pass
    assert state_of(pipe) == before


def test_models_they_cannot_follow_are_refused(pipe, watch):
    with pytest.raises(ModelError, match="U-Net of type"), watch(object()):
        pass
    net = make_controlnet(pipe.unet)
    controlled = AutoPipelineForText2Image.from_pipe(pipe, controlnet=net)
    net.mid_block.compile()
    if watch is WATCHES["regions"]:
        with pytest.raises(ModelError, match="ControlNetModel is compiled"), watch(controlled):
            pass
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ModelError, match="UNet2DConditionModel is compiled"), watch(pipe):
        pass
