"""The training pictures of the recipe: drawn once, kept as one array, their specs redrawn."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np

from sefi_fast.tiny_world.drawing import IMAGE_SIZE, ImageSpec, draw, random_specs

_CHUNK = 500


def _draw_chunk(specs: list[ImageSpec]) -> np.ndarray:
    return np.stack([np.asarray(draw(spec)[0]) for spec in specs])


def drawn_images(
    count: int, seed: int, work: Path, processes: int = 1
) -> tuple[np.ndarray, list[ImageSpec]]:
    """Random pictures without held-out identities, and what each shows.

    Args:
        count: number of pictures.
        seed: of the random specs.
        work: folder where the array is kept between runs.
        processes: how many draw side by side.

    Returns:
        uint8 [count, 48, 48, 3], and the specs in the same order.
    """
    specs = random_specs(count, seed)
    path = work / f"pictures-{count}-{seed}.npy"
    if path.exists():
        return np.load(path), specs
    chunks = [specs[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.map(_draw_chunk, chunks)
    else:
        parts = [_draw_chunk(chunk) for chunk in chunks]
    pictures = np.concatenate(parts)
    assert pictures.shape == (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    work.mkdir(parents=True, exist_ok=True)
    # np.save adds .npy to any other ending.
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    np.save(part, pictures)
    os.replace(part, path)
    return pictures, specs
