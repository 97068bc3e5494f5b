"""The command that trains the judge on drawn pictures, spoilt so that it bears generated ones."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.tiny_world.progress import Budget
from sefi_fast.tiny_world.drawing import ImageSpec, draw, held_out_identities, random_spec
from sefi_fast.tiny_world.judge import ATTRIBUTES, Judge, JudgeNetwork, right_answers, true_values

_UNSEEN = -100


def judge_specs(count: int, seed: int, held_out_share: float = 0.1) -> list[ImageSpec]:
    """Random pictures for the judge, which unlike the generator sees held-out identities too."""
    rng, held_out = random.Random(seed), held_out_identities()
    return [
        random_spec(
            rng, rng.choice(held_out) if rng.random() < held_out_share else None, grey_share=0.1
        )
        for _ in range(count)
    ]


def train_judge(
    out: Path,
    *,
    minutes: float = 2.5,
    pictures: int = 16_000,
    seed: int = 1,
    device: str = "cpu",
    max_steps: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    progress: bool = True,
) -> dict[str, float]:
    """Train and save a judge.

    Args:
        out: safetensors file.
        minutes: training time, after drawing.
        pictures: how many are drawn.
        seed: of the pictures, the weights and every draw; not the seed of the generator's.
        device: "cpu" or "cuda".
        max_steps: ends training earlier.
        batch_size: pictures a step.
        learning_rate: its peak.
        progress: show a progress bar.

    Returns:
        Share of right answers for each attribute on 1,000 fresh pictures of held-out identities.
    """
    torch.manual_seed(seed)
    place = torch.device(device)
    specs = judge_specs(pictures, seed)
    drawn = torch.from_numpy(np.stack([np.asarray(draw(spec)[0]) for spec in specs]))
    answers = torch.tensor([_classes(spec) for spec in specs])
    network = JudgeNetwork().to(place)
    network.body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.02, fused=True
    )
    budget = Budget("judge", minutes * 60, max_steps, progress)
    for step in budget.steps():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * budget.rate(step, warm_up=100, flat=0.2, end=0.01)
        picks = torch.randint(len(drawn), (batch_size,))
        batch = drawn[picks].to(place).permute(0, 3, 1, 2).float() / 127.5 - 1
        batch = spoil(batch).contiguous(memory_format=torch.channels_last)
        wanted = answers[picks].to(place)
        with torch.autocast(place.type, torch.bfloat16):
            logits = network(batch)
        losses = [
            F.cross_entropy(value.float(), wanted[:, k], ignore_index=_UNSEEN, reduction="sum")
            for k, value in enumerate(logits.values())
        ]
        loss = torch.stack(losses).sum() / batch_size
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            budget.note = f"loss {loss.item():.3f}"
    judge = Judge(network.cpu())
    judge.save(out)
    return accuracy(judge, 1000, seed=seed + 1)


def accuracy(judge: Judge, count: int, seed: int) -> dict[str, float]:
    """Share of right answers for each attribute on drawn pictures of held-out identities."""
    rng, held_out = random.Random(seed), held_out_identities()
    specs = [random_spec(rng, rng.choice(held_out), grey_share=0.1) for _ in range(count)]
    return right_answers(specs, judge([draw(spec)[0] for spec in specs]))


def spoil(pictures: Tensor) -> Tensor:
    """Blur, shift, recolour and add noise to pictures [B, 3, H, W] in −1..1, each its own way."""
    count, device = len(pictures), pictures.device

    def each(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *(shape or (1, 1, 1)), device=device) * (high - low) + low

    dx, dy = (int(v) for v in torch.randint(-2, 3, (2,)))
    padded = F.pad(pictures, (2, 2, 2, 2), mode="replicate")
    height, width = pictures.shape[-2:]
    moved = padded[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coarse = F.interpolate(F.avg_pool2d(moved, 2), scale_factor=2.0, mode="bilinear")
    share = each(0, 1) * (each(0, 1) < 0.7)
    softer = torch.where(each(0, 1) < 0.5, blurred, coarse)
    mixed = moved + share * (softer - moved)
    tinted = mixed * each(0.85, 1.12) * each(0.95, 1.05, 3, 1, 1) + each(-0.08, 0.08)
    grain = torch.randn_like(tinted) * each(0, 0.1)
    # Generated pictures err in smooth patches rather than pixel by pixel.
    patches = F.interpolate(
        torch.randn(count, 3, 12, 12, device=device), size=(height, width), mode="bilinear"
    )
    return (tinted + grain + patches * each(0, 0.12)).clamp(-1, 1)


def _classes(spec: ImageSpec) -> list[int]:
    values = true_values(spec).items()
    return [_UNSEEN if value is None else ATTRIBUTES[name].index(value) for name, value in values]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m evals.tiny_world.judge_training``."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.tiny_world.judge_training", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--minutes", type=float, default=2.5, help="training time (default: 2.5)")
    parser.add_argument("--pictures", type=int, default=16_000, help="drawn (default: 16000)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options.pop("threads"))
    for name, share in train_judge(**options).items():
        print(f"{name:14s} {share:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
