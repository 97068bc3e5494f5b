"""The picture's latent distribution, computed once, and samples of it for each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sefi_fast.errors import ModelError, TrainingError


@dataclass(frozen=True)
class LatentDistribution:
    """Normal distribution of the scaled latent of a picture and of its mirror image.

    Attributes:
        mean: [V, C, h, w] float32, V = 2 with the mirror image and 1 without, in the units that
            the U-Net sees (shift and scaling factor applied).
        std: the same shape and units.
    """

    mean: Tensor
    std: Tensor

    @property
    def views(self) -> int:
        """2 with the mirror image, 1 without."""
        return self.mean.shape[0]

    def sample(self, view: Tensor, noise: Tensor) -> Tensor:
        """Latents [B, C, h, w] of the views [B] for standard normal `noise` of that shape."""
        return self.mean[view] + self.std[view] * noise


@torch.no_grad()
def encode_picture(vae: AutoencoderKL, pixels: Tensor, flip: bool) -> LatentDistribution:
    """Encode a picture [3, h, w] in [-1, 1], and its mirror image if `flip`, with a float32 VAE.

    Raises:
        ModelError: the VAE is no AutoencoderKL.
        TrainingError: the VAE gives NaN or infinity, as some do in half precision.
    """
    views = torch.stack([pixels, pixels.flip(-1)] if flip else [pixels])
    weight = next(vae.parameters())
    encoded = vae.encode(views.to(weight.device, weight.dtype))
    if not hasattr(encoded, "latent_dist"):
        raise ModelError(
            f"the pipeline's VAE is an {type(vae).__name__}, which gives latents without a "
            "distribution: set pipe.vae to the model's own AutoencoderKL to train"
        )
    distribution = encoded.latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor
    channel_mean, channel_std = (getattr(vae.config, f"latents_{x}", None) for x in ("mean", "std"))
    if channel_mean is not None and channel_std is not None:
        # As SDXL's pipelines take it back: each channel has a mean and a spread of its own.
        shift, spread = (
            torch.tensor(x, dtype=torch.float32, device=weight.device).view(-1, 1, 1)
            for x in (channel_mean, channel_std)
        )
        scale = scale / spread
    mean = (distribution.mean.float() - shift) * scale
    std = distribution.std.float() * scale
    if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise TrainingError(
            "the VAE gives NaN or infinity for this picture: its weights are damaged, or were "
            "stored in float16 and overflow"
        )
    return LatentDistribution(mean, std)
