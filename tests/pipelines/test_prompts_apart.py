"""Pipelines that join prompts which they encode in several calls of encode_prompt."""

from __future__ import annotations

import diffusers
import pytest
import torch
from pipelines.features import IMAGE, KINDS, sample_small
from pipelines.sampling import assert_close, assert_differ, twin

from sefi_fast import attach, regions, trace
from sefi_fast.errors import ModelError

FREE_NOISE = KINDS["AnimateDiff, FreeNoise"]


@pytest.fixture
def subjects(make_subject):
    return [make_subject(distance=0), make_subject("<b>", "bear", stages=2)]


def test_free_noise_with_prompts_by_frame(pipe, subjects):
    pipe = FREE_NOISE.make(pipe, "SD 1.5")

    def run(first, negative):
        prompts = {0: first, 4: "a dog in the snow"}
        return sample_small(pipe, prompts, negative_prompt=negative, **FREE_NOISE.arguments)

    expected = run("a photo of a cat", "a car")
    other = run("a photo of a car", {0: "a cat", 2: ""})
    attach(pipe, subjects)
    assert_close(run("a photo of a cat", "a car"), expected)
    assert_close(run("a photo of a <it>", "a car"), expected)
    assert_close(run("a photo of a car", {0: "a <it>", 2: ""}), other)
    assert_differ(run("a photo of a <b>", "a car"), expected)
    pipe.disable_free_noise()
    assert sample_small(pipe, "a <b>", **FREE_NOISE.arguments).isfinite().all()


def test_free_noise_with_subjects_without_a_common_number_of_stages(pipe, make_subject):
    pipe = FREE_NOISE.make(pipe, "SD 1.5")
    attach(pipe, [make_subject(f"<{stages}>", stages=stages) for stages in (11, 13)])
    with pytest.raises(ValueError, match="11, 13 stages need 143 stages together"):
        sample_small(pipe, "a <7>", **FREE_NOISE.arguments)


def cycle(pipe, prompt, **arguments):
    settings = {"strength": 0.8, "guidance_scale": 2, "output_type": "latent"}
    return pipe(prompt=prompt, image=IMAGE, **settings, **arguments).images


def find_mask(pipe, prompt, **arguments):
    mask = pipe.generate_mask(image=IMAGE, target_prompt=prompt, num_maps_per_mask=1, **arguments)
    return torch.tensor(mask)


@pytest.mark.parametrize(
    ("name", "call"),
    [("CycleDiffusionPipeline", cycle), ("StableDiffusionDiffEditPipeline", find_mask)],
)
def test_a_source_prompt_next_to_a_prompt(pipe, subjects, name, call):
    parts = {}
    if call is find_mask:
        inverse = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
        parts["inverse_scheduler"] = inverse
    pipe = twin(pipe, getattr(diffusers, name), **parts)

    def run(prompt):
        generator = torch.Generator().manual_seed(0)
        return call(pipe, prompt, source_prompt="a dog", num_inference_steps=3, generator=generator)

    expected = run("a cat")
    attach(pipe, subjects)
    for prompt in ("a cat", "a <it>"):
        assert_close(run(prompt), expected)
    assert_differ(run("a <b>"), expected)
    refused = pytest.raises(ModelError, match="encodes its prompts in several calls")
    with refused, regions(pipe, {"a <b>": (0, 0, 0.5, 1)}):
        run("a <it>")
    with refused, trace(pipe, ["<it>"]):
        run("a <it>")
