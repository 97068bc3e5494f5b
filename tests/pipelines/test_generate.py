"""generate: each image has a seed of its own, in batches of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipelines.sampling import assert_close, both_families, sample

from sefi_fast import attach, generate


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


@both_families
def test_image_i_depends_on_seed_plus_i_alone(pipe, make_subject):
    attach(pipe, make_subject())
    arguments = {"steps": 3, "guidance": 4.0, "negative_prompt": "a car"}
    together = generate(pipe, "a <it>", n=3, seed=7, **arguments)
    in_parts = generate(pipe, "a <it>", n=3, seed=7, batch_size=2, **arguments)
    alone = [generate(pipe, "a <it>", seed=7 + i, **arguments)[0] for i in range(3)]
    for one, other, expected in zip(together, in_parts, alone, strict=True):
        assert one.size == (128, 128)
        assert abs(pixels(one) - pixels(expected)).max() <= 1
        assert abs(pixels(other) - pixels(expected)).max() <= 1
    assert abs(pixels(together[0]) - pixels(together[1])).max() > 5


def test_arguments_reach_the_pipeline(pipe):
    shared = {"negative_prompt": "a dog", "height": 64, "width": 128}
    arguments = {"seed": 3, "steps": 4, "guidance": 5.0, "output_type": "latent"}
    latents = generate(pipe, "a cat", **arguments, **shared)
    assert latents[0].shape == (4, 8, 16)
    assert_close(latents[0], sample(pipe, "a cat", seed=3, **shared)[0], 1e-4)


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [
        ("np", np.ndarray, (64, 128, 3)),
        ("pt", torch.Tensor, (3, 64, 128)),
        ("latent", torch.Tensor, (4, 8, 16)),
    ],
)
def test_every_output_type_gives_a_list_of_images(pipe, output_type, kind, shape):
    settings = {"n": 3, "batch_size": 2, "steps": 1, "height": 64, "width": 128}
    found = generate(pipe, "a cat", output_type=output_type, **settings)
    assert isinstance(found, list) and [one.shape for one in found] == [shape] * 3
    assert all(isinstance(one, kind) for one in found)
    if output_type == "np":
        for one, image in zip(found, generate(pipe, "a cat", **settings), strict=True):
            assert abs(one * 255 - pixels(image)).max() <= 1


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"n": 0}, ValueError, "n of at least 1, but it is 0"),
        ({"steps": 0}, ValueError, "steps of at least 1, but it is 0"),
        ({"batch_size": 0}, ValueError, "batch_size of at least 1, but it is 0"),
        ({"steps": 2000}, ValueError, "2000 steps, and this model was trained on 1000"),
        ({"guidance": float("inf")}, ValueError, "finite guidance"),
        ({"seed": -1}, ValueError, r"seeds between 0 and 2\*\*63"),
        ({"width": 100, "height": 64}, ValueError, "divisible by 8"),
        ({"prompt": ["a cat"]}, TypeError, r"prompt must be one sentence, got \['a cat'\]"),
        ({"prompt": None}, TypeError, "prompt must be one sentence, got None"),
        ({"negative_prompt": ["a cat"]}, TypeError, "negative_prompt must be one sentence"),
        ({"num_images_per_prompt": 2}, TypeError, "num_images_per_prompt itself: give n"),
        ({"num_inference_steps": 2}, TypeError, "give steps"),
        ({"generator": None}, TypeError, "give seed"),
        ({"return_dict": False}, TypeError, "it returns the images alone"),
    ],
)
def test_wrong_arguments_are_refused_before_sampling(pipe, monkeypatch, given, error, words):
    monkeypatch.setattr(pipe.unet, "forward", None)
    with pytest.raises(error, match=words):
        generate(pipe, **{"prompt": "a cat", **given})
