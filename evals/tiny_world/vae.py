"""The autoencoder of the bundled model: 48×48 images to latents of 12×12×8 and back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from evals.tiny_world.images import to_tensor
from evals.tiny_world.loop import Loop, Settings
from sefi_fast.tiny_world.drawing import IMAGE_SIZE

LATENT_CHANNELS = 8
DOWNSCALING = 4
_CROP = 32
_KEPT = 64


def make_vae() -> AutoencoderKL:
    """Return an untrained autoencoder, 0.66 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def train_vae(images: np.ndarray, out: Path, settings: Settings) -> float:
    """Train the autoencoder on crops, then whole images; save it with unit-variance latents.

    The first three latent channels are tied to the local mean color. That keeps the latents
    smooth, so that a small U-Net learns them quickly.

    Args:
        images: uint8 [N, 48, 48, 3]; the first 64 are kept for measuring.
        out: folder of the model.
        settings: settings of the training.

    Returns:
        Peak signal-to-noise ratio on the kept images, in dB.
    """
    torch.manual_seed(settings.seed)
    rng, device = np.random.default_rng(settings.seed), settings.place
    model = make_vae().to(device, memory_format=torch.channels_last)
    loop = Loop(
        "vae", model.parameters(), 3e-3, settings, warm_up=60, flat=0.3, end=0.03, decay=1e-3
    )
    average = [weight.detach().clone() for weight in loop.weights]
    for step in loop.steps():
        # On a CPU small batches reach a quality sooner.
        batch = images[rng.integers(_KEPT, len(images), 8)]
        if loop.share < 0.85:
            batch = _crop(batch, rng)
        target = to_tensor(batch, device)
        if rng.random() < 0.5:
            target = target.flip(-1)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = model.encode(target).latent_dist
            noise = torch.randn_like(posterior.mean)
            output = model.decode(posterior.mean + noise * posterior.std).sample
        loop.descend(_loss(output.float(), target, posterior.mean, posterior.logvar), step)
        loop.update_average(average, step, 0.99)
    with torch.no_grad():
        for weight, mean in zip(loop.weights, average, strict=True):
            weight.copy_(mean)
    model.eval()
    _normalise_latents(model, to_tensor(images[:512], device))
    with torch.no_grad():
        kept = to_tensor(images[:_KEPT], device)
        output = model.decode(model.encode(kept).latent_dist.mean).sample.clamp(-1, 1)
    model.save_pretrained(out)
    # The values span 2.
    return 10 * math.log10(4 / float((output - kept).pow(2).mean()))


def encode_images(model: AutoencoderKL, images: np.ndarray, device: torch.device) -> Tensor:
    """Return means of the latents, float32 [N, 8, 12, 12] on the CPU."""
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for start in range(0, len(images), 200):
            batch = to_tensor(images[start : start + 200], device)
            parts.append(model.encode(batch).latent_dist.mean.float().cpu())
    return torch.cat(parts).clone()


def _crop(batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut one window from all images; every second one at the bottom, where the creatures are."""
    places = (IMAGE_SIZE - _CROP) // DOWNSCALING
    left = int(rng.integers(places + 1)) * DOWNSCALING
    top = int(rng.integers(places + 1) if rng.random() < 0.5 else places) * DOWNSCALING
    return batch[:, top : top + _CROP, left : left + _CROP]


def _loss(output: Tensor, target: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    error = output - target
    edges = sum((output.diff(dim=axis) - target.diff(dim=axis)).abs().mean() for axis in (-1, -2))
    mean, logvar = mean.float(), logvar.float()
    divergence = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    anchor = (mean[:, :3] - 1.6 * F.avg_pool2d(target, DOWNSCALING)).pow(2).mean()
    loss = error.abs().mean() + 2 * error.pow(2).mean() + 0.5 * edges
    return loss + 1e-4 * divergence + 0.2 * anchor


@torch.no_grad()
def _normalise_latents(model: AutoencoderKL, images: Tensor) -> None:
    """Fold each latent channel's mean and scale into the 1×1 convolutions around the latents."""
    batches = torch.split(images, 64)
    latents = torch.cat([model.encode(batch).latent_dist.mean for batch in batches])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after, channels = model.quant_conv, model.post_quant_conv, LATENT_CHANNELS
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
