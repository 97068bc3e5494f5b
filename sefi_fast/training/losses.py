"""The terms of the training loss (docs/method.md, equations 6, 13 and 14), one number a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def noise_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, float32 [B] whatever the prediction's dtype."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def mask_loss(maps: Tensor, present: Tensor, mask: Tensor) -> Tensor:
    """Equation 13 of docs/method.md: [B].

    Args:
        maps: [B, T, N], head-mean attention of the image tokens to the placeholder's T places.
        present: bool [B, T], False for the places that a sentence lacks.
        mask: [B, N] in [0, 1], the share of the subject in each image token.
    """
    peak = maps.amax(2, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    distance = (maps / peak - mask.unsqueeze(1)).square().mean(2)
    return (distance * present).sum(1) / present.sum(1)


def layer_mean(terms: Sequence[Tensor]) -> Tensor:
    """Mean over layers of terms [B] each: [B]."""
    return torch.stack(list(terms)).mean(0)
