"""Attached subjects give what a sampling loop by hand gives, and detach leaves no trace."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from pipelines.sampling import (
    assert_close,
    assert_differ,
    both_families,
    encode_prompt,
    sample,
    sample_by_hand,
    state_of,
    subject_for,
    twin,
)

from sefi_fast import attach, detach, encode
from sefi_fast.errors import ModelError, SubjectFileError

# Placeholder → class word, stages, split: stages that meet on ten, one tied, one of two vectors.
FOUR = {
    "<a>": ("cat", 5, True),
    "<b>": ("red dog", 10, True),
    "<c>": ("bear", 1, True),
    "<d>": ("person", 2, False),
}


@both_families
def test_a_plain_prompt_gives_the_image_of_the_bare_pipeline(pipe, make_subject):
    arguments = {"negative_prompt": "a blue car", "num_images_per_prompt": 2}
    expected = sample(pipe, "a photo of a dog", **arguments)
    attach(pipe, make_subject())
    assert_close(sample(pipe, "a photo of a dog", **arguments), expected, 1e-5)


@both_families
def test_detach_restores_everything_bit_for_bit(pipe, make_subject):
    expected = sample(pipe, "a photo of a cat")
    before = state_of(pipe)
    assert attach(pipe, make_subject()) is pipe
    assert state_of(pipe) != before
    encode_prompt(pipe, "<it>")
    assert detach(pipe) is pipe
    assert state_of(pipe) == before
    assert torch.equal(sample(pipe, "a photo of a cat"), expected)
    assert detach(pipe) is pipe


@both_families
@pytest.mark.parametrize("negative", [None, "", "a red {}"])
@pytest.mark.parametrize("split", [True, False])
def test_an_untrained_subject_gives_the_image_of_its_class_word(
    pipe, make_subject, split, negative
):
    def run(word):
        other = negative and negative.format(word)
        return sample(pipe, f"a photo of a {word} on the beach", negative_prompt=other)

    expected = run("cat")
    attach(pipe, make_subject(distance=0, split=split))
    assert_close(run("<it>"), expected)


SCHEDULERS = {
    "DDIM": (DDIMScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler with fractional timesteps": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "Heun": (HeunDiscreteScheduler, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "zero terminal signal": (
        DDIMScheduler,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
}


@pytest.mark.parametrize(
    ("family", "scheduler", "negative"),
    [("sd15", name, "a car") for name in SCHEDULERS if name != "zero terminal signal"]
    + [("sd21", "zero terminal signal", "a car"), ("sdxl", "Euler", None)]
    + [("sdxl", "Euler", "a car")],
)
def test_each_step_takes_the_tokens_of_its_stage(pipe, make_subject, scheduler, negative):
    kind, options = SCHEDULERS[scheduler]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    subjects = [make_subject(), make_subject("<me>", "person", stages=10, split=False)]
    prompt = "a photo of a <it> with a <me>"
    by_hand = {"prompt": prompt, "subjects": subjects, "negative": negative, "steps": 7}
    expected = sample_by_hand(pipe, **by_hand)
    pooled_from_keys = sample_by_hand(pipe, **by_hand, pooled_stream=0)
    attach(pipe, subjects)
    actual = sample(pipe, prompt, negative_prompt=negative, num_inference_steps=7)
    assert_close(actual, expected)
    if hasattr(pipe, "text_encoder_2"):
        assert_differ(actual, pooled_from_keys)


def test_attaching_again_replaces_the_subjects(pipe, make_subject, tmp_path):
    before = state_of(pipe)
    first, second = make_subject(), make_subject("<me>", "person")
    path = tmp_path / "me.safetensors"
    second.save(path)
    attach(pipe, first)
    expected = sample(pipe, "a <it>")
    with_second = encode(pipe, "a <me>", subjects=second)
    for given in ([path], path, str(path)):
        attach(pipe, given)
        assert torch.equal(encode(pipe, "a <me>"), with_second)
        assert encode_prompt(pipe, "a <it>")[0].shape[2] == 48
    attach(pipe, [second, first])
    assert_close(sample(pipe, "a <it>"), expected)
    detach(pipe)
    assert state_of(pipe)["unet."] == before["unet."]


@both_families
@pytest.mark.parametrize(
    "prompt",
    ["a photo of a <a> and a <b> with a <c> on a <d>", "the <d> of <b>, a <a> and the <d>"],
)
def test_four_subjects_from_files_in_one_prompt(pipe, tmp_path, prompt):
    subjects = [subject_for(pipe, name, *made) for name, made in FOUR.items() if name in prompt]
    files = [tmp_path / f"{subject.class_word}.safetensors" for subject in subjects]
    for subject, file in zip(subjects, files, strict=True):
        subject.save(file)
    expected = sample_by_hand(pipe, prompt, subjects, steps=7)
    attach(pipe, reversed(files))
    actual = sample(pipe, prompt, num_inference_steps=7)
    assert_close(actual, expected)
    for subject in subjects:
        other = prompt.replace(subject.placeholder, subject.class_word)
        assert_differ(sample(pipe, other, num_inference_steps=7), actual)


@both_families
def test_a_batch_gives_the_images_of_its_prompts_alone(pipe, make_subject):
    attach(pipe, [make_subject(), make_subject("<me>", "person", stages=10)])
    prompts = ["a photo of a <it>", "a dog in the snow", "a <me> with a <it>"]
    negatives = ["a red <me>", "", "a blue car"]
    together = sample(pipe, prompts, negative_prompt=negatives)
    for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = sample(pipe, prompt, seed=index, negative_prompt=negative)
        assert_close(together[index : index + 1], alone)


def with_flipped_class(pipe):
    subject = subject_for(pipe)
    subject.class_embeddings = [-subject.class_embeddings[0]]
    return subject


def with_one_placeholder(pipe):
    return [subject_for(pipe), subject_for(pipe, "<me>"), subject_for(pipe, class_word="dog")]


@pytest.mark.parametrize(
    ("subjects", "error", "words"),
    [
        (with_one_placeholder, ValueError, "2 of the subjects have the placeholder '<it>'"),
        (lambda pipe: [], ValueError, "at least one"),
        (lambda pipe: "missing.safetensors", SubjectFileError, "missing"),
        (with_flipped_class, SubjectFileError, "random"),
    ],
)
def test_refused_subjects_leave_the_pipeline_as_it_was(pipe, make_subject, subjects, error, words):
    for attached in (None, make_subject("<other>", "person")):
        if attached is not None:
            attach(pipe, attached)
        before = state_of(pipe)
        with pytest.raises(error, match=words):
            attach(pipe, subjects(pipe))
        assert state_of(pipe) == before
    assert encode_prompt(pipe, "a <other>")[0].shape[2] == 5 * (2 * 48 + 1)


class Editing(StableDiffusionPipeline):
    def encode_prompt(self, prompt, image):
        raise NotImplementedError


class WithoutPrompts(StableDiffusionPipeline):
    encode_prompt: ClassVar = None


class FluxPipeline:
    transformer = torch.nn.Identity()


@pytest.mark.parametrize(
    ("family", "make", "words"),
    [
        ("sd15", lambda pipe: twin(pipe, text_encoder=None), "no text_encoder"),
        ("sd15", lambda pipe: FluxPipeline(), "FluxPipeline denoises with a transformer"),
        ("sd15", lambda pipe: object(), "U-Net of type NoneType"),
        ("sd15", lambda pipe: twin(pipe, Editing), r"without device, .* and with image\)"),
        (
            "sd15",
            lambda pipe: twin(pipe, WithoutPrompts),
            "WithoutPrompts has no encode_prompt",
        ),
        (
            "sdxl",
            lambda pipe: twin(
                pipe, StableDiffusionXLImg2ImgPipeline, text_encoder=None, tokenizer=None
            ),
            "second text encoder of SDXL alone",
        ),
    ],
)
def test_other_pipelines_are_refused(pipe, make_subject, make, words):
    other, subject = make(pipe), make_subject()
    with pytest.raises(ModelError, match=words):
        attach(other, subject)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
    ],
    ids=["EDM", "continuous"],
)
def test_schedulers_without_training_timesteps_are_refused(pipe, make_subject, scheduler):
    attached, pipe.scheduler = attach(twin(pipe), make_subject()), scheduler
    before = state_of(pipe)
    with pytest.raises(ModelError, match="logarithm of the noise"):
        attach(pipe, make_subject())
    assert state_of(pipe) == before
    attached.scheduler = scheduler
    with pytest.raises(ModelError, match="logarithm of the noise"):
        sample(attached, "a <it>")
