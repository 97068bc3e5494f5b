"""generate: each picture has a seed of its own, whatever is drawn beside it."""

from __future__ import annotations

import numpy as np
import pytest
from pipelines.sampling import draw

from sefi_fast.pipelines import attach, generate


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_picture_i_comes_from_seed_plus_i_alone(sd15_pipeline, make_subject):
    attach(sd15_pipeline, make_subject())
    arguments = {"steps": 3, "guidance": 4.0, "negative_prompt": "a car"}
    together = generate(sd15_pipeline, "a <it>", n=3, seed=7, **arguments)
    in_parts = generate(sd15_pipeline, "a <it>", n=3, seed=7, batch_size=2, **arguments)
    alone = [generate(sd15_pipeline, "a <it>", seed=7 + i, **arguments)[0] for i in range(3)]
    assert len(together) == len(in_parts) == 3
    for a, b, c in zip(together, in_parts, alone, strict=True):
        assert a.size == (128, 128)
        assert abs(pixels(a) - pixels(c)).max() <= 1
        assert abs(pixels(b) - pixels(c)).max() <= 1
    assert abs(pixels(together[0]) - pixels(together[1])).max() > 5


def test_arguments_reach_the_pipeline(sd15_pipeline):
    latents = generate(
        sd15_pipeline,
        "a cat",
        seed=3,
        steps=4,
        guidance=5.0,
        negative_prompt="a dog",
        height=64,
        width=128,
        output_type="latent",
    )
    expected = draw(sd15_pipeline, "a cat", seed=3, negative_prompt="a dog", height=64, width=128)
    assert latents[0].shape == (4, 8, 16)
    assert abs(latents[0] - expected[0]).max() < 1e-4


@pytest.mark.parametrize("name", ["n", "steps", "batch_size"])
def test_counts_below_one_are_refused(sd15_pipeline, name):
    with pytest.raises(ValueError, match=f"{name} of at least 1, but it is 0"):
        generate(sd15_pipeline, "a cat", **{name: 0})
