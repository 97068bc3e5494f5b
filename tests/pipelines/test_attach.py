"""Attached subjects draw what a sampling loop by hand draws, and leave no trace when detached."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from pipelines.sampling import draw, sample_by_hand, state_of

import sefi_fast
from sefi_fast.errors import ModelError, SubjectFileError
from sefi_fast.pipelines import attach, detach

CLOSE = {"rtol": 0, "atol": 2e-4}


def test_a_plain_prompt_draws_what_the_bare_pipeline_draws(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    arguments = {"negative_prompt": "a blue car", "num_images_per_prompt": 2}
    expected = draw(pipe, "a photo of a dog", **arguments)
    attach(pipe, make_subject())
    torch.testing.assert_close(
        draw(pipe, "a photo of a dog", **arguments), expected, rtol=0, atol=1e-5
    )


def test_detach_leaves_everything_bit_for_bit_as_it_was(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    expected = draw(pipe, "a photo of a cat")
    before = state_of(pipe)
    assert attach(pipe, make_subject()) is pipe
    assert state_of(pipe) != before
    pipe.encode_prompt("<it>", torch.device("cpu"), 1, True)
    assert detach(pipe) is pipe
    assert state_of(pipe) == before
    assert torch.equal(draw(pipe, "a photo of a cat"), expected)
    assert detach(pipe) is pipe


@pytest.mark.parametrize("split", [True, False])
def test_an_untrained_subject_draws_its_class_word(sd15_pipeline, make_subject, split):
    pipe = sd15_pipeline
    expected = draw(pipe, "a photo of a cat on the beach", negative_prompt="a red cat")
    attach(pipe, make_subject(distance=0, split=split))
    actual = draw(pipe, "a photo of a <it> on the beach", negative_prompt="a red <it>")
    torch.testing.assert_close(actual, expected, **CLOSE)


SCHEDULERS = {
    "ddim": lambda config: None,
    "euler": EulerDiscreteScheduler.from_config,
    "euler with fractional timesteps": lambda config: EulerDiscreteScheduler.from_config(
        config, use_karras_sigmas=True
    ),
    "heun": HeunDiscreteScheduler.from_config,
    "dpm++": lambda config: DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", use_karras_sigmas=True
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_step_takes_the_tokens_of_its_stage(sd15_pipeline, make_subject, name):
    pipe = sd15_pipeline
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler.config) or pipe.scheduler
    subject = make_subject()
    expected = sample_by_hand(pipe, "a photo of a <it> on the beach", [subject], negative="a car")
    attach(pipe, subject)
    actual = draw(pipe, "a photo of a <it> on the beach", negative_prompt="a car")
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    plain = draw(pipe, "a photo of a cat on the beach", negative_prompt="a car")
    assert (plain - actual).abs().max() > 1e-2


def test_two_subjects_of_5_and_10_stages_stand_in_one_prompt(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    subjects = [make_subject(), make_subject("<me>", "person", stages=10, split=False)]
    prompt = "a photo of a <me> with a <it>"
    expected = sample_by_hand(pipe, prompt, subjects, steps=7)
    attach(pipe, subjects)
    actual = draw(pipe, prompt, num_inference_steps=7)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_attaching_again_replaces_the_subjects(sd15_pipeline, make_subject, tmp_path):
    pipe = sd15_pipeline
    before = state_of(pipe)
    first, second = make_subject(), make_subject("<me>", "person")
    attach(pipe, first)
    expected = draw(pipe, "a <it>")
    second.save(tmp_path / "me.safetensors")
    attach(pipe, [tmp_path / "me.safetensors"])
    assert [s.placeholder for s in pipe.encode_prompt.subjects] == ["<me>"]
    attach(pipe, str(tmp_path / "me.safetensors"))
    attach(pipe, [second, first])
    torch.testing.assert_close(draw(pipe, "a <it>"), expected, **CLOSE)
    detach(pipe)
    assert state_of(pipe)["unet."] == before["unet."]


def test_the_samples_of_a_batch_do_not_meet(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    attach(pipe, [make_subject(), make_subject("<me>", "person", stages=10)])
    prompts = ["a photo of a <it>", "a dog in the snow", "a <me> with a <it>"]
    negatives = ["a red <me>", "", "a blue car"]
    together = draw(pipe, prompts, negative_prompt=negatives)
    for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = draw(pipe, prompt, seed=index, negative_prompt=negative)
        torch.testing.assert_close(together[index : index + 1], alone, **CLOSE)


def test_no_guidance_and_several_pictures(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    attach(pipe, make_subject())
    pair = draw(pipe, "a <it>", guidance_scale=1.0, num_images_per_prompt=2)
    torch.testing.assert_close(pair[1:], draw(pipe, "a <it>", seed=1, guidance_scale=1.0), **CLOSE)
    assert (pair[0] - pair[1]).abs().max() > 1e-2


def picture(seed=0):
    noise = torch.randint(0, 256, (128, 128, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


@pytest.mark.parametrize(
    "pipeline_class", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline]
)
def test_img2img_and_inpaint(sd15_pipeline, make_subject, pipeline_class):
    pipe = pipeline_class(**sd15_pipeline.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"image": picture(), "strength": 0.8, "negative_prompt": "a car"}
    if pipeline_class is StableDiffusionInpaintPipeline:
        arguments["mask_image"] = picture(1).convert("L")
    expected = draw(pipe, "a photo of a cat", **arguments)
    attach(pipe, make_subject(distance=0))
    torch.testing.assert_close(draw(pipe, "a photo of a <it>", **arguments), expected, **CLOSE)
    attach(pipe, make_subject())
    assert (draw(pipe, "a photo of a <it>", **arguments) - expected).abs().max() > 1e-2
    detach(pipe)
    assert torch.equal(draw(pipe, "a photo of a cat", **arguments), expected)


def test_wrong_subjects_are_refused_and_change_nothing(sd15_pipeline, make_subject, tmp_path):
    pipe = sd15_pipeline
    before = state_of(pipe)
    with pytest.raises(ValueError, match="placeholder '<it>'"):
        attach(pipe, [make_subject(), make_subject(class_word="dog")])
    with pytest.raises(ValueError, match="at least one"):
        attach(pipe, [])
    with pytest.raises(SubjectFileError):
        attach(pipe, tmp_path / "missing.safetensors")
    foreign = make_subject()
    foreign.class_embeddings = [-foreign.class_embeddings[0]]
    with pytest.raises(SubjectFileError, match="random"):
        attach(pipe, foreign)
    assert state_of(pipe) == before


def test_other_pipelines_are_refused_in_words(sd15_pipeline, make_subject):
    parts = dict(sd15_pipeline.components)
    subject = make_subject()
    bare = StableDiffusionPipeline(
        **(parts | {"text_encoder": None}), requires_safety_checker=False
    )
    with pytest.raises(ModelError, match="no text_encoder"):
        attach(bare, subject)

    class FluxPipeline:
        transformer = torch.nn.Identity()

    with pytest.raises(ModelError, match="FluxPipeline denoises with a transformer"):
        attach(FluxPipeline(), subject)
    with pytest.raises(ModelError, match="U-Net of type NoneType"):
        attach(object(), subject)

    class Editing(StableDiffusionPipeline):
        def encode_prompt(self, prompt, image):
            raise NotImplementedError

    with pytest.raises(
        ModelError, match=r"without device, .* and with image\)\. Write the class word"
    ):
        attach(Editing(**parts, requires_safety_checker=False), subject)

    class WithoutPrompts(StableDiffusionPipeline):
        encode_prompt = None

    with pytest.raises(ModelError, match="WithoutPrompts has no encode_prompt"):
        attach(WithoutPrompts(**parts, requires_safety_checker=False), subject)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
    ],
    ids=["EDM", "continuous"],
)
def test_times_that_are_no_training_steps_are_refused(sd15_pipeline, make_subject, scheduler):
    usual, sd15_pipeline.scheduler = sd15_pipeline.scheduler, scheduler
    before = state_of(sd15_pipeline)
    with pytest.raises(ModelError, match="logarithm of the noise"):
        attach(sd15_pipeline, make_subject())
    assert state_of(sd15_pipeline) == before
    sd15_pipeline.scheduler = usual
    attach(sd15_pipeline, make_subject())
    sd15_pipeline.scheduler = scheduler
    with pytest.raises(ModelError, match="logarithm of the noise"):
        draw(sd15_pipeline, "a <it>")


def test_the_package_hands_attach_and_detach_on():
    assert sefi_fast.attach is attach and sefi_fast.detach is detach
