"""Noised latents and targets are those of diffusers, and draws cover all timesteps."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from sefi_fast.errors import ModelError
from sefi_fast.training.noise import NoiseSchedule, sample_noise

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
@pytest.mark.parametrize(
    "betas",
    [
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
        {"trained_betas": torch.linspace(1e-4, 0.03, 1000).tolist()},
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_forward_process_is_that_of_ddpm(kind, betas, prediction_type):
    settings = {**betas, "prediction_type": prediction_type}
    plain = DDPMScheduler(**settings)
    schedule = NoiseSchedule(kind(**settings), CPU)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 5, 5, generator=generator)
    timesteps = torch.tensor([0, 1, 100, 500, 998, 999])
    close = {"rtol": 1e-5, "atol": 1e-6}
    got = schedule.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(got, plain.add_noise(latents, noise, timesteps), **close)
    wanted = noise
    if prediction_type == "v_prediction":
        wanted = plain.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), wanted, **close)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(trained_betas=[0.1] * 10), "not a noise schedule of 1000 steps"),
        (DDIMScheduler(trained_betas=[-0.5] * 1000), "not a noise schedule of 1000 steps"),
        (DDIMScheduler(beta_end=float("inf")), "not a noise schedule of 1000 steps"),
        (DDIMScheduler(prediction_type="sample"), "'sample'"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler has no beta"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "logarithm of the noise",
        ),
    ],
)
def test_schedulers_that_cannot_be_trained_with_are_refused(scheduler, message):
    with pytest.raises(ModelError, match=message):
        NoiseSchedule(scheduler, CPU)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type):
    """In units of the clean image's squared error, which is the noise's over SNR: min(SNR, γ)."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    schedule = NoiseSchedule(scheduler, CPU)
    snr = scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())
    found = schedule.min_snr_weights(5.0).double()
    unit = {"epsilon": snr, "v_prediction": snr + 1}[prediction_type]
    # All but one factor for all, by which their mean is one.
    ratio = found * unit / snr.clamp(max=5)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
    assert float(found.mean()) == pytest.approx(1)
    assert float(snr[0]) > 5 > float(snr[-1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_at_zero_terminal_snr(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    weights = NoiseSchedule(scheduler, CPU).min_snr_weights(5.0)
    assert bool(torch.isfinite(weights).all())
    # Predicted noise weighs alike at all small SNR, and a velocity of pure noise nothing.
    last = float(weights.max()) if prediction_type == "epsilon" else 0.0
    assert float(weights[-1]) == pytest.approx(last, abs=1e-4)


def drawn(batch_size, seed=0, **changes):
    settings = {"num_train_timesteps": 1000, "views": 2, "templates": 3, "latent_shape": (4, 6, 6)}
    generator = torch.Generator().manual_seed(seed)
    return sample_noise(generator, batch_size=batch_size, **{**settings, **changes})


def test_every_part_of_the_timesteps_is_sampled_once():
    for seed in range(20):
        for batch_size in (1, 3, 5, 8, 32):
            timesteps = drawn(batch_size, seed).timesteps
            part = (timesteps.double() + 0.5) * batch_size / 1000
            assert part.floor().tolist() == pytest.approx(range(batch_size), abs=1)
            assert timesteps.min() >= 0 and timesteps.max() <= 999


def test_shapes_and_distributions_of_a_sample():
    one = drawn(64)
    assert one.noise.shape == one.latent_noise.shape == (64, 4, 6, 6)
    assert not torch.equal(one.noise, one.latent_noise)
    assert set(one.view.tolist()) == {0, 1} and set(one.template.tolist()) == {0, 1, 2}
    assert abs(float(one.noise.mean())) < 0.05 and abs(float(one.noise.std()) - 1) < 0.05


def test_a_sample_depends_on_its_generator_alone():
    before = torch.random.get_rng_state()
    first = drawn(4, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, first, drawn(4, seed=3)))
    assert not torch.equal(first.noise, drawn(4, seed=4).noise)
