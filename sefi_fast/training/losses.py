"""The two terms of the training loss (docs/method.md, equation 6)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def noise_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over everything, in float32 whatever the prediction's dtype."""
    return torch.nn.functional.mse_loss(prediction.float(), target.float())


def alignment_loss(alignments: Iterable[Tensor]) -> Tensor:
    """Mean over layers of the mean over samples of equation 5; each entry is [B] float32."""
    return torch.stack([alignment.mean() for alignment in alignments]).mean()
