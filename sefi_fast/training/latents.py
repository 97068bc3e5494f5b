"""Latents and loss masks of training images."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from sefi_fast.errors import ImageError, ModelError, TrainingError
from sefi_fast.training.image import load_image, prepare

logger = logging.getLogger(__name__)


def load_mask(
    source: str | os.PathLike[str] | Image.Image | np.ndarray,
    image: Image.Image,
    size: int,
    crop: str = "center",
) -> Tensor:
    """Return the mask of a prepared image, float32 [size, size] in [0, 1], 1 on the subject.

    Args:
        source: an image file or PIL image, white on the subject, and black or transparent
            elsewhere, or an array [h, w] of bool, integers in [0, 255] or floats in [0, 1].
        image, size, crop: of the image that the mask belongs to, as for `prepare`.

    Raises:
        ImageError: the mask cannot be read, has another size than the image, or shows nothing
            of the subject in the square that is trained on.
    """
    mask = open_mask(source)
    if mask.size != image.size:
        raise ImageError(
            f"the mask is {mask.width}×{mask.height} pixels and its image {image.width}×"
            f"{image.height}: draw the mask on the image itself"
        )
    # Bicubic resizing overshoots at edges.
    square = ((prepare(mask, size, crop).mean(0) + 1) / 2).clamp(0, 1)
    check_selection(
        square.min().item(),
        square.max().item(),
        f"the part that is trained on (the {crop} square is kept)",
    )
    return square


def open_mask(source: str | os.PathLike[str] | Image.Image | np.ndarray) -> Image.Image:
    """Return a mask as an RGB image; transparent parts are black."""
    try:
        return load_image(source, background="black")
    except ImageError as error:
        raise ImageError(f"the mask: {error}") from error


def check_selection(lowest: float, highest: float, where: str) -> None:
    """Raise ImageError for a mask without a white part, and warn of one without a black part.

    Args:
        lowest, highest: of the mask's values in [0, 1].
        where: the part of the image that they are from, for the message.
    """
    if highest <= 0.5:
        raise ImageError(
            f"the mask is empty in {where}. It must be white on the subject, and black or "
            "transparent elsewhere. Draw it again"
        )
    if lowest > 0.5:
        logger.warning(
            "the mask is white everywhere in %s: it selects all of it, as no mask does", where
        )


@dataclass(frozen=True)
class LatentDistribution:
    """Normal distribution of the scaled latent of an image and of its mirror image.

    Attributes:
        mean, std: [V, C, h, w] float32, V = 2 with the mirror image and 1 without, in the units
            that the U-Net sees (shift and scaling factor applied).
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
def encode_image(vae: AutoencoderKL, pixels: Tensor, flip: bool) -> LatentDistribution:
    """Encode an image [3, h, w] in [-1, 1], and its mirror image if `flip`, with a float32 VAE."""
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
        # As SDXL's pipelines invert it: each channel has its own mean and spread.
        shift, spread = (
            torch.tensor(x, dtype=torch.float32, device=weight.device).view(-1, 1, 1)
            for x in (channel_mean, channel_std)
        )
        scale = scale / spread
    mean = (distribution.mean.float() - shift) * scale
    std = distribution.std.float() * scale
    if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise TrainingError(
            "the VAE gives NaN or infinity for this image: its weights are damaged, or were "
            "stored in float16 and overflow"
        )
    return LatentDistribution(mean, std)
