"""A U-Net shared by pipelines, processors replaced behind our back, copies and threads."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from importlib.util import find_spec

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from pipelines.features import load_lora
from pipelines.sampling import draw, state_of

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.attention.processor import SeFiAttnProcessor
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.pipelines import attach, detach, regions, trace

CLOSE = {"rtol": 0, "atol": 2e-4}


def second_pipeline(pipe):
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = pipe.scheduler.__class__.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


def test_pipelines_that_share_a_unet(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    other = second_pipeline(pipe)
    before = state_of(pipe)["unet."], dict(pipe.unet.attn_processors)
    plain = draw(other, "a photo of a dog")
    attach(pipe, make_subject())
    mine = draw(pipe, "a <it>")
    torch.testing.assert_close(draw(other, "a photo of a dog"), plain, rtol=0, atol=1e-5)
    attach(other, make_subject("<me>", "person"))
    theirs = draw(other, "a <me>")
    assert (theirs - mine).abs().max() > 1e-2
    torch.testing.assert_close(draw(pipe, "a <it>"), mine, **CLOSE)
    detach(pipe)
    torch.testing.assert_close(draw(other, "a <me>"), theirs, **CLOSE)
    torch.testing.assert_close(draw(pipe, "a photo of a dog"), plain, rtol=0, atol=1e-5)
    detach(other)
    assert (state_of(pipe)["unet."], dict(pipe.unet.attn_processors)) == before
    assert torch.equal(draw(other, "a photo of a dog"), plain)


def test_a_pipeline_made_from_an_attached_one(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    arguments = {"image": image, "strength": 1.0}
    expected = draw(AutoPipelineForImage2Image.from_pipe(pipe), "a photo of a dog", **arguments)
    attach(pipe, make_subject())
    mine = draw(pipe, "a <it>")
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    actual = draw(other, "a photo of a dog", **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    attach(other, make_subject(distance=0, class_word="dog"))
    torch.testing.assert_close(
        draw(other, "a photo of a <it>", **arguments), expected, rtol=0, atol=2e-4
    )
    detach(other)
    torch.testing.assert_close(draw(pipe, "a <it>"), mine, **CLOSE)


def test_a_pipeline_that_is_gone_does_not_hold_the_shared_unet(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    before = dict(pipe.unet.attn_processors)
    other = second_pipeline(pipe)
    attach(other, make_subject())
    attach(pipe, make_subject())
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    detach(pipe)
    assert dict(pipe.unet.attn_processors) == before
    assert not pipe.unet._forward_pre_hooks


def test_a_pipeline_dropped_without_detach_leaves_nothing_behind(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    before = state_of(pipe)
    for another in (second_pipeline, copy.copy):
        other = attach(another(pipe), make_subject())
        assert state_of(pipe) != before
        del other
        gc.collect()
        assert state_of(pipe) == before


def test_a_shallow_copy_is_attached_and_detached_by_itself(sd15_pipeline, make_subject):
    pipe = attach(sd15_pipeline, make_subject())
    mine = draw(pipe, "a <it>")
    other = copy.copy(pipe)
    detach(other)
    torch.testing.assert_close(draw(pipe, "a <it>"), mine, **CLOSE)
    attach(other, make_subject("<me>", "person"))
    detach(pipe)
    assert torch.isfinite(draw(other, "a <me>")).all()
    detach(other)
    assert "encode_prompt" not in vars(other) and not pipe.unet._forward_pre_hooks


def test_threads_with_a_shared_unet(sd15_pipeline, make_subject):
    pipes = [sd15_pipeline, second_pipeline(sd15_pipeline)]
    prompts = ["a photo of a <it>", "a <me> in the snow"]
    attach(pipes[0], make_subject())
    attach(pipes[1], make_subject("<me>", "person", stages=3))
    expected = [draw(pipe, prompt) for pipe, prompt in zip(pipes, prompts, strict=True)]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(index):
        for _ in range(3):
            results[index].append(draw(pipes[index], prompts[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(results[index]) == 3
        for result in results[index]:
            torch.testing.assert_close(result, expected[index], **CLOSE)


def remove_hooks(pipe):
    pipe.unet._forward_pre_hooks.clear()
    pipe.unet._forward_pre_hooks_with_kwargs.clear()
    for attn in cross_attention_layers(pipe.unet).values():
        attn.to_k._forward_pre_hooks.clear()


class Foreign(AttnProcessor):
    """A class that diffusers does not know."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def unfuse(pipe):
    pipe.unet.fuse_qkv_projections()
    pipe.unet.unfuse_qkv_projections()


CHANGES = {
    "default processors": lambda pipe: pipe.unet.set_default_attn_processor(),
    "one processor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    "a dictionary": lambda pipe: pipe.unet.set_attn_processor(
        {name: AttnProcessor() for name in pipe.unet.attn_processors}
    ),
    "a processor of the user": lambda pipe: pipe.unet.set_attn_processor(Foreign()),
    "our processor": lambda pipe: pipe.unet.set_attn_processor(SeFiAttnProcessor(backend="eager")),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "fused projections": lambda pipe: pipe.unet.fuse_qkv_projections(),
    "unfused projections": unfuse,
    "LoRA": load_lora,
    "LoRA and away": lambda pipe: (load_lora(pipe), pipe.unload_lora_weights()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_processors_and_projections_changed_after_attaching(sd15_pipeline, make_subject, name):
    pipe, change = sd15_pipeline, CHANGES[name]
    if "LoRA" in name and not find_spec("peft"):
        pytest.skip("peft is missing")
    other = copy.deepcopy(pipe)
    change(other)
    attach(other, make_subject())
    expected = draw(other, "a <it>")
    attach(pipe, make_subject())
    change(pipe)
    torch.testing.assert_close(draw(pipe, "a <it>"), expected, **CLOSE)
    chosen = dict(pipe.unet.attn_processors)
    detach(pipe)
    assert dict(pipe.unet.attn_processors) == chosen
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("name", ["default processors", "attention slicing", "LoRA and away"])
def test_processors_and_projections_changed_while_a_picture_is_drawn(
    sd15_pipeline, make_subject, name
):
    def change(pipe, step, timestep, tensors):
        CHANGES[name](pipe)
        return tensors

    if "LoRA" in name and not find_spec("peft"):
        pytest.skip("peft is missing")
    attach(sd15_pipeline, make_subject())
    expected = draw(sd15_pipeline, "a <it>")
    actual = draw(sd15_pipeline, "a <it>", callback_on_step_end=change)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_hooks_that_were_removed_are_put_on_again(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    attach(pipe, make_subject())
    expected = draw(pipe, "a <it>")
    remove_hooks(pipe)
    torch.testing.assert_close(draw(pipe, "a <it>"), expected, **CLOSE)
    detach(pipe)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("kind", [AttnProcessor2_0, SlicedAttnProcessor, SeFiAttnProcessor])
def test_a_trace_gives_back_the_processors_it_found(sd15_pipeline, make_subject, kind):
    pipe = sd15_pipeline
    chosen = kind(1) if kind is SlicedAttnProcessor else kind()
    pipe.unet.set_attn_processor(chosen)
    for _ in range(2):
        with trace(pipe, "cat") as found:
            draw(pipe, "a cat", num_inference_steps=1)
        assert found.maps["cat"].any()
        assert all(processor is chosen for processor in pipe.unet.attn_processors.values())
        attach(pipe, make_subject())


# Of a plain prompt as long as a packed one of other libraries, and of CLIP's own length.
@pytest.mark.parametrize("tokens", [77, 154, 155])
def test_a_call_goes_on_undisturbed_while_others_attach_and_detach(
    sd15_pipeline, make_subject, tokens
):
    pipe, other = sd15_pipeline, second_pipeline(sd15_pipeline)
    subject = make_subject()
    changes = [lambda: attach(other, subject), lambda: detach(other)] * 4
    prompt = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(0))
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": prompt.flip(1)}
    expected = draw(pipe, None, **given)

    def change(module, args):
        if changes:
            changes.pop(0)()

    handles = [
        layer.register_forward_pre_hook(change)
        for attn in cross_attention_layers(pipe.unet).values()
        for layer in (attn, attn.to_v)
    ]
    assert torch.equal(draw(pipe, None, **given), expected)
    assert not changes
    for handle in handles:
        handle.remove()


def test_a_detached_subject_is_not_drawn_on_without_a_word(sd15_pipeline, make_subject):
    pipe = attach(sd15_pipeline, make_subject())

    def end(pipe, step, timestep, tensors):
        detach(pipe)
        return tensors

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        draw(pipe, "a <it>", callback_on_step_end=end)


def test_threads_that_attach_and_detach_the_same_pipeline(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    before, failed = state_of(pipe), []
    subjects = [make_subject(), make_subject("<me>", "person")]

    def work(subject):
        try:
            for _ in range(20):
                attach(pipe, subject)
                detach(pipe)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(subject,)) for subject in subjects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert state_of(pipe) == before


def test_hooks_bear_a_call_without_keywords(sd15_pipeline, make_subject):
    # So torch calls them while another thread registers or removes them.
    pipe = attach(sd15_pipeline, make_subject())
    for model in (pipe.unet, pipe.text_encoder):
        (hook,) = model._forward_pre_hooks.values()
        assert hook(model, (torch.zeros(1, 2, dtype=torch.int64),)) is None


@pytest.mark.parametrize("watch", [trace, regions])
def test_hooks_of_a_trace_and_of_regions_bear_it_too(sd15_pipeline, watch):
    pipe = sd15_pipeline
    wanted = "cat" if watch is trace else {"a cat": (0, 0, 0.5, 1)}
    with watch(pipe, wanted):
        draw(pipe, "a cat", num_inference_steps=1)
        for hook in pipe.unet._forward_pre_hooks.values():
            assert hook(pipe.unet, ()) is None
        assert not pipe.unet._forward_hooks_with_kwargs
        for hook in pipe.unet._forward_hooks.values():
            assert hook(pipe.unet, (), None) is None


def test_a_trace_leaves_out_other_pipelines_of_its_thread(sd15_pipeline):
    pipe, other = sd15_pipeline, second_pipeline(sd15_pipeline)
    with trace(pipe, "cat") as found:
        draw(pipe, "a cat")
        expected = found.maps["cat"]
        draw(other, "a dog on the hill")
    assert torch.equal(found.maps["cat"], expected)


def test_a_call_that_has_begun_hooks_nothing_after_detach(sd15_pipeline, make_subject):
    pipe = attach(sd15_pipeline, make_subject())
    (hook,) = pipe.unet._forward_pre_hooks.values()
    detach(pipe)
    hook.before(pipe.unet)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied_by", [pickled, saved, copy.deepcopy])
def test_copies_of_an_attached_pipeline_are_attached_by_themselves(
    sd15_pipeline, make_subject, copied_by
):
    pipe = sd15_pipeline
    before = draw(pipe, "a dog")
    attach(pipe, make_subject())
    expected = draw(pipe, "a <it>")
    copied = copied_by(pipe)
    assert copied.encode_prompt is not pipe.encode_prompt
    detach(pipe)
    torch.testing.assert_close(draw(copied, "a <it>"), expected, **CLOSE)
    with pytest.raises(PromptError, match="as plain words"):
        draw(second_pipeline(copied), "a <it>")
    detach(copied)
    torch.testing.assert_close(draw(copied, "a dog"), before, rtol=0, atol=1e-5)
    for model in (copied.unet, copied.text_encoder):
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert "_sefi_patch" not in vars(model)


@pytest.mark.parametrize("copied_by", [pickled, saved, copy.deepcopy])
def test_copies_of_the_models_of_an_attached_pipeline(sd15_pipeline, make_subject, copied_by):
    pipe = sd15_pipeline
    before = draw(pipe, "a dog")
    attach(pipe, make_subject())
    expected = draw(pipe, "a <it>")
    other = second_pipeline(pipe)
    other.unet, other.text_encoder = map(copied_by, (pipe.unet, pipe.text_encoder))
    detach(pipe)
    torch.testing.assert_close(draw(other, "a dog"), before, rtol=0, atol=1e-5)
    attach(other, make_subject())
    torch.testing.assert_close(draw(other, "a <it>"), expected, **CLOSE)
    detach(other)
    for model in (other.unet, other.text_encoder):
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("part", ["unet", None])
@pytest.mark.parametrize("copied_by", [pickled, copy.deepcopy])
def test_a_pipeline_is_not_copied_while_it_is_traced(sd15_pipeline, copied_by, part):
    pipe = sd15_pipeline
    with trace(pipe, "dog"), pytest.raises(ModelError, match="Leave their with block"):
        copied_by(getattr(pipe, part) if part else pipe)
    assert copied_by(pipe) is not pipe


@pytest.mark.slow
def test_a_compiled_unet_draws_the_same(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    plain = draw(pipe, "a dog")
    attach(pipe, make_subject())
    expected = draw(pipe, "a <it>")
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(draw(pipe, "a <it>"), expected, **CLOSE)
    torch.testing.assert_close(draw(pipe, "a dog"), plain, rtol=0, atol=1e-5)
    detach(pipe)
    torch.testing.assert_close(draw(pipe, "a dog"), plain, rtol=0, atol=1e-5)
