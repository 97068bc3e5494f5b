"""generate: each image has a seed of its own, whatever is drawn beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [
        ("np", np.ndarray, (64, 128, 3)),
        ("pt", torch.Tensor, (3, 64, 128)),
        ("latent", torch.Tensor, (4, 8, 16)),
    ],
)
def test_every_output_type_gives_a_list_of_pictures(sd15_pipeline, output_type, kind, shape):
    settings = {"n": 3, "batch_size": 2, "steps": 1, "height": 64, "width": 128}
    found = generate(sd15_pipeline, "a cat", output_type=output_type, **settings)
    assert isinstance(found, list) and [one.shape for one in found] == [shape] * 3
    assert all(isinstance(one, kind) for one in found)
    if output_type == "np":
        expected = generate(sd15_pipeline, "a cat", **settings)
        for one, picture in zip(found, expected, strict=True):
            assert abs(one * 255 - pixels(picture)).max() <= 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": ["a cat", "a dog"]}, r"prompt must be one sentence, got \['a cat', 'a dog'\]"),
        ({"prompt": None}, "prompt must be one sentence, got None"),
        ({"negative_prompt": ["a cat"]}, "negative_prompt must be one sentence"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt itself: give n"),
        ({"num_inference_steps": 2}, "give steps"),
        ({"generator": None}, "give seed"),
        ({"return_dict": False}, "it returns the images alone"),
    ],
)
def test_what_is_no_sentence_or_given_otherwise_is_told_before_drawing(
    sd15_pipeline, monkeypatch, given, words
):
    monkeypatch.setattr(sd15_pipeline, "unet", None)
    with pytest.raises(TypeError, match=words):
        generate(sd15_pipeline, **{"prompt": "a cat", **given})


def test_a_width_that_is_no_multiple_of_8_is_told_before_drawing(sd15_pipeline, monkeypatch):
    monkeypatch.setattr(sd15_pipeline.unet, "forward", None)
    with pytest.raises(ValueError, match="divisible by 8"):
        generate(sd15_pipeline, "a cat", width=100, height=64)
