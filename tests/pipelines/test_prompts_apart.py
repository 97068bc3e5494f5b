"""Pipelines that join prompts which they encode in several calls of encode_prompt."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import DDIMInverseScheduler
from pipelines.features import IMAGE, KINDS, draw
from pipelines.sampling import subject_for

from sefi_fast.errors import ModelError
from sefi_fast.pipelines import attach, regions, trace

CLOSE = {"rtol": 0, "atol": 2e-3}


@pytest.fixture
def subjects(sd15_pipeline):
    return [
        subject_for(sd15_pipeline, distance=0),
        subject_for(sd15_pipeline, "<b>", "bear", stages=2),
    ]


def test_free_noise_with_prompts_by_frame(sd15_pipeline, subjects):
    kind = KINDS["AnimateDiff, FreeNoise"]
    pipe = kind.make(sd15_pipeline, "SD 1.5")

    def drawn(first, negative):
        return draw(
            pipe,
            {0: first, 4: "a dog in the snow"},
            negative_prompt=negative,
            **kind.arguments,
        )

    expected = drawn("a photo of a cat", "a car")
    other = drawn("a photo of a car", {0: "a cat", 2: ""})
    attach(pipe, subjects)
    torch.testing.assert_close(drawn("a photo of a cat", "a car"), expected, **CLOSE)
    torch.testing.assert_close(drawn("a photo of a <it>", "a car"), expected, **CLOSE)
    torch.testing.assert_close(drawn("a photo of a car", {0: "a <it>", 2: ""}), other, **CLOSE)
    assert (drawn("a photo of a <b>", "a car") - expected).abs().max() > 1e-2
    pipe.disable_free_noise()
    assert draw(pipe, "a <b>", **kind.arguments).isfinite().all()


def test_free_noise_with_subjects_without_a_common_number_of_stages(sd15_pipeline):
    kind = KINDS["AnimateDiff, FreeNoise"]
    pipe = kind.make(sd15_pipeline, "SD 1.5")
    attach(pipe, [subject_for(pipe, f"<{stages}>", stages=stages) for stages in (11, 13)])
    with pytest.raises(ValueError, match="11, 13 stages need 143 stages together"):
        draw(pipe, "a <7>", **kind.arguments)


def cycle(pipe, prompt, generator):
    return pipe(
        prompt=prompt,
        source_prompt="a dog",
        image=IMAGE,
        strength=0.8,
        num_inference_steps=3,
        guidance_scale=2,
        generator=generator,
        output_type="latent",
    ).images


def find_mask(pipe, prompt, generator):
    mask = pipe.generate_mask(
        image=IMAGE,
        target_prompt=prompt,
        source_prompt="a dog",
        num_inference_steps=3,
        num_maps_per_mask=1,
        generator=generator,
    )
    return torch.tensor(mask)


@pytest.mark.parametrize(
    ("name", "call"),
    [("CycleDiffusionPipeline", cycle), ("StableDiffusionDiffEditPipeline", find_mask)],
)
def test_a_source_prompt_beside_a_prompt(sd15_pipeline, subjects, name, call):
    kind = getattr(diffusers, name)
    parts = {name: part for name, part in sd15_pipeline.components.items() if part is not None}
    if call is find_mask:
        parts["inverse_scheduler"] = DDIMInverseScheduler.from_config(parts["scheduler"].config)
    pipe = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def called(prompt):
        return call(pipe, prompt, torch.Generator().manual_seed(0))

    expected = called("a cat")
    attach(pipe, subjects)
    for prompt in ("a cat", "a <it>"):
        torch.testing.assert_close(called(prompt), expected, **CLOSE)
    assert (called("a <b>") - expected).abs().max() > 1e-2
    refused = pytest.raises(ModelError, match="encodes its prompts in several calls")
    with refused, regions(pipe, {"a <b>": (0, 0, 0.5, 1)}):
        called("a <it>")
    with refused, trace(pipe, ["<it>"]):
        called("a <it>")
