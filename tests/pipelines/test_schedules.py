"""Schedules that subjects meet: velocity prediction to zero signal, few steps, no guidance."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler
from pipelines.sampling import draw, sample_by_hand, subject_for

from sefi_fast.pipelines import attach

CLOSE = {"rtol": 0, "atol": 5e-4}


def test_velocity_prediction_with_zero_terminal_signal(sd21_pipeline):
    pipe = sd21_pipeline
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    subject = subject_for(pipe)
    expected = sample_by_hand(pipe, "a photo of a <it>", [subject], negative="a car", steps=5)
    attach(pipe, subject)
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int(args[1])), with_kwargs=True
    )
    actual = draw(pipe, "a photo of a <it>", negative_prompt="a car", num_inference_steps=5)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert seen[0] == 999 and len(seen) == 5


FEW = {
    "LCM": (LCMScheduler, {}, 4, 1.0),
    "turbo": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, 1, 0.0),
}


@pytest.mark.parametrize("name", FEW)
def test_few_steps_without_guidance(sd15_pipeline, name):
    pipe = sd15_pipeline
    kind, options, steps, guidance = FEW[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance}
    expected = draw(pipe, "a photo of a cat", **arguments)
    attach(pipe, subject_for(pipe, distance=0))
    torch.testing.assert_close(draw(pipe, "a photo of a <it>", **arguments), expected, **CLOSE)
    stages = []
    attach(pipe, subject_for(pipe))
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: stages.append(int(float(args[1]) * 5 / 1000)),
        with_kwargs=True,
    )
    changed = draw(pipe, "a photo of a <it>", **arguments)
    assert (changed - expected).abs().max() > 1e-2
    assert len(stages) == steps and stages[0] == 4 and stages == sorted(stages, reverse=True)


def test_a_consistency_model_is_told_its_guidance(sd15_pipeline):
    from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    config = dict(sd15_pipeline.unet.config)
    config.pop("_use_default_values", None)
    unet = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 16}).eval()
    parts = sd15_pipeline.components | {
        "unet": unet,
        "scheduler": LCMScheduler.from_config(sd15_pipeline.scheduler.config),
    }
    pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe, "a photo of a cat", guidance_scale=8.0)
    attach(pipe, subject_for(pipe, distance=0))
    actual = draw(pipe, "a photo of a <it>", guidance_scale=8.0)
    torch.testing.assert_close(actual, expected, **CLOSE)
