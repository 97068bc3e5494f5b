"""A sheet of every prompt's keys with every prompt's values, as on the authors' page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from sefi_fast.evaluation.sheets import Panel, contact_sheet
from sefi_fast.pipelines import swap


def swap_sheet(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    panel_size: int = 144,
    **sampling: Any,
) -> Image.Image:
    """Draw a square of pictures: row i has the keys of prompt i, column j the values of prompt j.

    All start from the same noise. On the diagonal stand the pictures of the prompts themselves.
    Along a row the attention stays and the content changes, along a column the other way round.

    Args:
        pipe: a pipeline, with subjects attached or without.
        prompts: two or more sentences, best ones that differ in single words.
        seed: of the noise.
        panel_size: side of a picture in pixels.
        sampling: `steps`, `guidance` and what else `sefi_fast.swap` takes.

    Raises:
        ValueError: there are fewer than two prompts.
        ModelError, PromptError: as for `sefi_fast.swap`.
    """
    if isinstance(prompts, str) or len(prompts) < 2:
        raise ValueError(f"swap_sheet wants at least two prompts, got {prompts!r}")
    rows = []
    for keys in prompts:
        panels = []
        for values in prompts:
            (image,) = swap(pipe, key_prompt=keys, value_prompt=values, seed=seed, **sampling)
            panels.append(
                Panel(image, "values: the same" if values == keys else f"values: {values}")
            )
        rows.append((f"keys: {keys}", panels))
    return contact_sheet(
        rows, title="keys from one prompt, values from another", panel_size=panel_size
    )
