"""The training images of the recipe: drawn once, kept as one array, their specs made again."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sefi_fast.tiny_world.drawing import ImageSpec, draw, random_specs

_CHUNK = 500


def drawn_images(
    count: int, seed: int, work: Path, processes: int = 1
) -> tuple[np.ndarray, list[ImageSpec]]:
    """Draw random images without held-out identities.

    Args:
        count: number of images.
        seed: seed of the random specs.
        work: folder where the array is kept between runs.
        processes: number of processes that draw.

    Returns:
        uint8 [count, 48, 48, 3], and the specs in the same order.
    """
    specs = random_specs(count, seed)
    path = work / f"images-{count}-{seed}.npy"
    if path.exists():
        return np.load(path), specs
    if processes > 1:
        chunks = [specs[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            images = np.concatenate(pool.map(draw_all, chunks))
    else:
        images = draw_all(specs)
    work.mkdir(parents=True, exist_ok=True)
    # np.save adds .npy to any other ending.
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    np.save(part, images)
    os.replace(part, path)
    return images, specs


def draw_all(specs: list[ImageSpec]) -> np.ndarray:
    """Draw images, uint8 [N, 48, 48, 3]."""
    return np.stack([np.asarray(draw(spec)[0]) for spec in specs])


def to_tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 [B, H, W, 3] to float32 [B, 3, H, W] in −1..1, channels last in memory."""
    tensor = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)
