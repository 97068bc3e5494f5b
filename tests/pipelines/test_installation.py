"""A U-Net shared by pipelines, processors replaced behind our back, copies and threads."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from pipelines.sampling import draw, state_of

from sefi_fast.errors import ModelError
from sefi_fast.layers import cross_attention_layers
from sefi_fast.pipelines import attach, detach
from sefi_fast.processor import SeFiAttnProcessor

CLOSE = {"rtol": 0, "atol": 2e-4}


def second_pipeline(pipe):
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = pipe.scheduler.__class__.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


def test_pipelines_that_share_a_unet(sd15_pipeline, make_subject, caplog):
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
    assert "put on again" not in caplog.text
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


def test_processors_set_while_a_picture_is_drawn_are_told(sd15_pipeline, make_subject):
    def replace(pipe, step, timestep, tensors):
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        return tensors

    attach(sd15_pipeline, make_subject())
    with pytest.raises(ModelError, match="AttnProcessor2_0 after the prompt was encoded"):
        draw(sd15_pipeline, "a <it>", callback_on_step_end=replace)


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


def take_xformers(pipe):
    # Of the cross-attention alone: self-attention would run xformers, which need not be there.
    for layer in cross_attention_layers(pipe.unet).values():
        layer.set_processor(XFormersAttnProcessor())


REPLACEMENTS = {
    "xformers": take_xformers,
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "default processors": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    "fused projections": lambda pipe: pipe.unet.fuse_qkv_projections(),
    "removed hooks": remove_hooks,
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_what_was_replaced_after_attaching_is_put_on_again(
    sd15_pipeline, make_subject, caplog, name
):
    pipe = sd15_pipeline
    attach(pipe, make_subject())
    expected = draw(pipe, "a <it>")
    REPLACEMENTS[name](pipe)
    with caplog.at_level(logging.WARNING, logger="sefi_fast"):
        actual = draw(pipe, "a <it>")
        assert "put on again" in caplog.text
        caplog.clear()
        draw(pipe, "a <it>")
        assert not caplog.text
    torch.testing.assert_close(actual, expected, **CLOSE)
    detach(pipe)
    assert not pipe.unet._forward_pre_hooks


def test_processors_set_after_attaching_stay_after_detaching(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    attach(pipe, make_subject())
    pipe.enable_attention_slicing(1)
    draw(pipe, "a <it>")
    detach(pipe)
    kinds = {type(processor) for processor in pipe.unet.attn_processors.values()}
    assert kinds == {SlicedAttnProcessor}
    attach(pipe, make_subject())
    chosen = AttnProcessor2_0()
    pipe.unet.set_attn_processor(chosen)
    detach(pipe)
    assert all(processor is chosen for processor in pipe.unet.attn_processors.values())


def test_processors_that_do_more_are_not_replaced(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    name, layer = list(cross_attention_layers(pipe.unet).items())[3]
    before = layer.processor
    layer.set_processor(PAGIdentitySelfAttnProcessor2_0())
    state = state_of(pipe)
    with pytest.raises(ModelError, match="PAGIdentitySelfAttnProcessor2_0"):
        attach(pipe, make_subject())
    assert state_of(pipe) == state
    layer.set_processor(before)
    attach(pipe, make_subject())
    layer.set_processor(PAGIdentitySelfAttnProcessor2_0())
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        draw(pipe, "a <it>")
    detach(pipe)
    assert type(layer.processor) is PAGIdentitySelfAttnProcessor2_0


def test_a_backend_chosen_before_attaching_is_kept(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    mine = SeFiAttnProcessor(backend="eager")
    pipe.unet.set_attn_processor(mine)
    attach(pipe, make_subject())
    layers = cross_attention_layers(pipe.unet).values()
    assert {attn.processor.backend for attn in layers} == {"eager"}
    assert all(attn.processor.split_streams for attn in layers)
    detach(pipe)
    assert all(attn.processor is mine for attn in layers)


def test_another_unet_put_into_an_attached_pipeline(sd15_pipeline, make_subject, caplog):
    pipe = sd15_pipeline
    attach(pipe, make_subject())
    old, new = pipe.unet, copy.deepcopy(pipe.unet)
    detach(pipe)
    expected_new = dict(old.attn_processors)
    attach(pipe, make_subject())
    expected = draw(pipe, "a <it>")
    pipe.unet = new
    torch.testing.assert_close(draw(pipe, "a <it>"), expected, **CLOSE)
    assert dict(old.attn_processors) == expected_new
    assert not old._forward_pre_hooks


def test_a_deep_copy_of_an_attached_pipeline_is_attached_by_itself(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    attach(pipe, make_subject())
    expected = draw(pipe, "a <it>")
    copied = copy.deepcopy(pipe)
    detach(pipe)
    torch.testing.assert_close(draw(copied, "a <it>"), expected, **CLOSE)
    assert copied.encode_prompt is not pipe.encode_prompt
    detach(copied)
    assert not copied.unet._forward_pre_hooks
    assert not any(isinstance(p, SeFiAttnProcessor) for p in copied.unet.attn_processors.values())
    assert "_sefi_installation" not in vars(copied.unet)


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
