"""Train the judge on drawn images, which are spoiled so that it reads generated ones."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.tiny_world.images import draw_all, to_tensor
from evals.tiny_world.loop import Loop, Settings
from sefi_fast.tiny_world.drawing import ImageSpec, draw, held_out_identities, random_spec
from sefi_fast.tiny_world.judge import ATTRIBUTES, Judge, JudgeNetwork, right_answers, true_values

_HELD_OUT_SHARE = 0.1
_GREY_SHARE = 0.1
_UNSEEN = -100


def train_judge(
    out: Path, images: int, settings: Settings, batch_size: int = 64
) -> dict[str, float]:
    """Train and save a judge.

    Args:
        out: safetensors file.
        images: number of drawn images. Unlike the generator's, they show held-out identities too.
        settings: settings of the training, with another seed than the generator's.
        batch_size: images per step.

    Returns:
        Share of right answers for each attribute on 1,000 fresh images of held-out identities.
    """
    torch.manual_seed(settings.seed)
    place = settings.place
    rng, held_out = random.Random(settings.seed), held_out_identities()
    specs = []
    for _ in range(images):
        identity = rng.choice(held_out) if rng.random() < _HELD_OUT_SHARE else None
        specs.append(random_spec(rng, identity, grey_share=_GREY_SHARE))
    drawn = draw_all(specs)
    answers = torch.tensor([_classes(spec) for spec in specs])
    network = JudgeNetwork().to(place)
    network.body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop = Loop(
        "judge", network.parameters(), 2e-3, settings, warm_up=100, flat=0.2, end=0.01, beta2=0.99,
        decay=0.02, clip=float("inf"),
    )  # fmt: skip
    for step in loop.steps():
        picks = torch.randint(len(drawn), (batch_size,))
        batch = spoil(to_tensor(drawn[picks.numpy()], place))
        wanted = answers[picks].to(place)
        with torch.autocast(place.type, torch.bfloat16):
            logits = network(batch.contiguous(memory_format=torch.channels_last))
        losses = [
            F.cross_entropy(value.float(), wanted[:, k], ignore_index=_UNSEEN, reduction="sum")
            for k, value in enumerate(logits.values())
        ]
        loop.descend(torch.stack(losses).sum() / batch_size, step)
    judge = Judge(network.cpu())
    judge.save(out)
    rng = random.Random(settings.seed + 1)
    specs = [random_spec(rng, rng.choice(held_out), grey_share=_GREY_SHARE) for _ in range(1000)]
    return right_answers(specs, judge([draw(spec)[0] for spec in specs]))


def spoil(images: Tensor) -> Tensor:
    """Blur, shift, recolor and add noise to images [B, 3, H, W] in −1..1, each in its own way."""
    count, device = len(images), images.device

    def each(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *(shape or (1, 1, 1)), device=device) * (high - low) + low

    dx, dy = (int(v) for v in torch.randint(-2, 3, (2,)))
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    height, width = images.shape[-2:]
    moved = padded[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coarse = F.interpolate(F.avg_pool2d(moved, 2), scale_factor=2.0, mode="bilinear")
    share = each(0, 1) * (each(0, 1) < 0.7)
    softer = torch.where(each(0, 1) < 0.5, blurred, coarse)
    mixed = moved + share * (softer - moved)
    tinted = mixed * each(0.85, 1.12) * each(0.95, 1.05, 3, 1, 1) + each(-0.08, 0.08)
    grain = torch.randn_like(tinted) * each(0, 0.1)
    # Generated images err in smooth patches rather than pixel by pixel.
    patches = torch.randn(count, 3, 12, 12, device=device)
    patches = F.interpolate(patches, size=(height, width), mode="bilinear")
    return (tinted + grain + patches * each(0, 0.12)).clamp(-1, 1)


def _classes(spec: ImageSpec) -> list[int]:
    values = true_values(spec).items()
    return [_UNSEEN if value is None else ATTRIBUTES[name].index(value) for name, value in values]
