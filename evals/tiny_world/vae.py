"""The autoencoder of the bundled model: 48×48 pictures to latents of 12×12×8 and back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from evals.tiny_world.progress import Budget
from sefi_fast.tiny_world.drawing import IMAGE_SIZE

LATENT_CHANNELS = 8
DOWNSCALING = 4
_CROP = 32


def make_vae() -> AutoencoderKL:
    """An untrained autoencoder, 0.66 M parameters."""
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


def to_tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in −1..1, channels last in memory."""
    tensor = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def train_vae(
    pictures: np.ndarray,
    out: Path,
    *,
    seconds: float,
    seed: int,
    device: torch.device,
    max_steps: int | None = None,
    learning_rate: float = 3e-3,
    batch_size: int = 8,
    progress: bool = True,
) -> float:
    """Train the autoencoder on crops, then whole pictures; save it with unit-variance latents.

    The first three latent channels are tied to the local mean colour, which keeps the latents
    smooth, so that a small U-Net learns them quickly.

    Args:
        pictures: uint8 [N, 48, 48, 3]; the first 64 are kept for measuring.
        out: folder for the model.
        seconds: training time.
        seed: of the weights and of every draw.
        device: CPU or CUDA.
        max_steps: ends training earlier.
        learning_rate: its peak.
        batch_size: small ones learn faster a second on a CPU.
        progress: show a progress bar.

    Returns:
        Peak signal-to-noise ratio on the kept pictures, in dB.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = make_vae().to(device, memory_format=torch.channels_last)
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(
        weights, learning_rate, betas=(0.9, 0.98), weight_decay=1e-3, fused=True
    )
    budget = Budget("vae", seconds, max_steps, progress)
    for step in budget.steps():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * budget.rate(step, warm_up=60, flat=0.3, end=0.03)
        batch = pictures[rng.integers(64, len(pictures), batch_size)]
        if budget.share < 0.85:
            batch = _crop(batch, rng)
        target = to_tensor(batch, device)
        if rng.random() < 0.5:
            target = target.flip(-1)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = model.encode(target).latent_dist
            noise = torch.randn_like(posterior.mean)
            output = model.decode(posterior.mean + noise * posterior.std).sample
        loss, error = _loss(output.float(), target, posterior.mean, posterior.logvar)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        keep = min(0.99, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - keep)
        if step % 50 == 0:
            budget.note = f"{_decibel(error.item()):.1f} dB"
    with torch.no_grad():
        for weight, mean in zip(weights, average, strict=True):
            weight.copy_(mean)
    model.eval()
    _normalise_latents(model, to_tensor(pictures[:512], device))
    with torch.no_grad():
        kept = to_tensor(pictures[:64], device)
        output = model.decode(model.encode(kept).latent_dist.mean).sample.clamp(-1, 1)
    model.save_pretrained(out)
    return _decibel((output - kept).pow(2).mean().item())


def encode_images(
    model: AutoencoderKL, pictures: np.ndarray, device: torch.device, batch_size: int = 200
) -> Tensor:
    """Means of the latents, float32 [N, 8, 12, 12] on the CPU."""
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for start in range(0, len(pictures), batch_size):
            batch = to_tensor(pictures[start : start + batch_size], device)
            parts.append(model.encode(batch).latent_dist.mean.float().cpu())
    return torch.cat(parts).clone()


def _crop(batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One window for the whole batch; every second one at the bottom, where the creatures are."""
    places = (IMAGE_SIZE - _CROP) // DOWNSCALING
    left = int(rng.integers(places + 1)) * DOWNSCALING
    top = int(rng.integers(places + 1) if rng.random() < 0.5 else places) * DOWNSCALING
    return batch[:, top : top + _CROP, left : left + _CROP]


def _loss(output: Tensor, target: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    error = (output - target).pow(2).mean()
    edges = sum((output.diff(dim=axis) - target.diff(dim=axis)).abs().mean() for axis in (-1, -2))
    mean, logvar = mean.float(), logvar.float()
    divergence = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    anchor = (mean[:, :3] - 1.6 * F.avg_pool2d(target, DOWNSCALING)).pow(2).mean()
    loss = (output - target).abs().mean() + 2 * error + 0.5 * edges
    return loss + 1e-4 * divergence + 0.2 * anchor, error


@torch.no_grad()
def _normalise_latents(model: AutoencoderKL, pictures: Tensor) -> None:
    """Fold each latent channel's mean and scale into the 1×1 convolutions around the latents."""
    latents = torch.cat([model.encode(part).latent_dist.mean for part in pictures.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after, channels = model.quant_conv, model.post_quant_conv, LATENT_CHANNELS
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]


def _decibel(squared_error: float) -> float:
    """Signal-to-noise ratio of pictures whose values span 2."""
    return 10 * math.log10(4 / squared_error)
