"""Traced maps against full maps computed next to the layers."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import HeunDiscreteScheduler, StableDiffusionControlNetImg2ImgPipeline
from models import make_controlnet
from PIL import Image
from pipelines.sampling import HINT, assert_close, both_families, encode_prompt, sample, twin

from sefi_fast import attach, detach, trace
from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.errors import ModelError, PromptError


class FullMaps:
    """Full maps of every cross-attention call, from the layers' own inputs."""

    def __init__(self, pipe, height=128, width=128):
        self.calls = []
        self.size = (height // 8, width // 8)
        self.handles = [
            attn.register_forward_pre_hook(self.look, with_kwargs=True)
            for attn in cross_attention_layers(pipe.unet).values()
        ]

    def look(self, attn, args, kwargs):
        prompt = kwargs["encoder_hidden_states"][:, :77]
        query, key = attn.to_q(args[0]), attn.to_k(prompt)
        query, key = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key))
        probabilities = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)
        self.calls.append(probabilities.mean(1))

    def word(self, positions, samples=1):
        """[samples, h, w]: mean over layers and steps of the sum over a word's columns."""
        total = 0
        for probabilities in self.calls:
            column = probabilities[-samples:, :, positions].sum(-1)
            sizes = [tuple(-(-side // factor) for side in self.size) for factor in (1, 2, 4, 8)]
            size = next(size for size in sizes if size[0] * size[1] == column.shape[1])
            column = column.unflatten(1, size)[:, None]
            total += F.interpolate(column, self.size, mode="bilinear", align_corners=False)[:, 0]
        for handle in self.handles:
            handle.remove()
        return total / len(self.calls)


def check(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


BEACH = ("a photo of a cat on the beach", {"cat": [5], "beach": [8]})


@pytest.mark.parametrize(
    ("prompt", "positions", "size", "guidance", "scheduler"),
    [
        (*BEACH, size, guidance, None)
        for size in [(128, 128), (64, 128), (104, 72)]
        for guidance in (1.0, 5.0)
    ]
    + [
        # A word of several tokens gets their sum.
        ("a zebra", {"zebra": [2, 3, 4, 5, 6]}, (128, 128), 5.0, None),
        # A scheduler that calls the U-Net twice a step.
        ("a dog", {"dog": [2]}, (128, 128), 5.0, HeunDiscreteScheduler),
    ],
)
def test_maps_of_a_bare_pipeline(pipe, prompt, positions, size, guidance, scheduler):
    height, width = size
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    arguments = {"height": height, "width": width, "guidance_scale": guidance}
    expected = sample(pipe, prompt, **arguments)
    full = FullMaps(pipe, *size)
    with trace(pipe, list(positions)) as found:
        assert_close(sample(pipe, prompt, **arguments), expected)
    assert list(found.maps) == list(positions)
    for word, columns in positions.items():
        one = found.maps[word]
        check(one, full.word(columns))
        assert one.shape == (1, height // 8, width // 8) and one.min() > 0 and one.max() < 1


def test_maps_of_subjects_in_batches_of_several_images(pipe, make_subject):
    attach(pipe, [make_subject(), make_subject("<me>", "person", stages=3)])
    prompts = ["a <it> in the snow", "the <me> with a <it> and a <it>"]
    full = FullMaps(pipe)
    with trace(pipe, ["<it>", "snow"]) as found:
        sample(pipe, prompts, num_images_per_prompt=2, negative_prompt=["a <it>", "a red <it>"])
    check(found.maps["<it>"], torch.cat([full.word([2], 4)[:2], full.word([5, 8], 4)[2:]]))
    check(found.maps["snow"][:2], full.word([5], 4)[:2])
    assert not found.maps["snow"][2:].any()
    assert found.overlay(Image.new("L", (96, 64)), "snow", 3).size == (96, 64)


@both_families
def test_a_subject_is_traced_as_its_class_word(pipe, make_subject):
    attach(pipe, make_subject(distance=0))
    with trace(pipe, ["<it>", "beach"]) as found:
        sample(pipe, "a photo of a <it> on the beach")
    detach(pipe)
    with trace(pipe, ["cat", "beach"]) as expected:
        sample(pipe, "a photo of a cat on the beach")
    for word, other in (("<it>", "cat"), ("beach", "beach")):
        assert_close(found.maps[word], expected.maps[other], 1e-4)


def test_maps_next_to_a_controlnet_and_an_image_to_change(pipe, make_subject):
    hint = HINT[..., :64, :]
    net = make_controlnet(pipe.unet, seed=1)
    pipe = twin(pipe, StableDiffusionControlNetImg2ImgPipeline, controlnet=net)
    arguments = {"image": hint, "control_image": 1 - hint, "strength": 1.0}
    arguments |= {"num_images_per_prompt": 2}
    attach(pipe, make_subject())
    expected = sample(pipe, "a <it> in the snow", **arguments)
    full = FullMaps(pipe, 64, 128)
    with trace(pipe, ["<it>", "snow"]) as found:
        assert_close(sample(pipe, "a <it> in the snow", **arguments), expected)
    check(found.maps["<it>"], full.word([2], 2))
    check(found.maps["snow"], full.word([5], 2))


def test_memory_does_not_grow_with_steps(pipe):
    sizes = []
    for steps in (2, 9):
        with trace(pipe, ["cat"]) as found:
            sample(pipe, "a cat", num_inference_steps=steps)
            gc.collect()
            objects = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
            sizes.append(sum(tensor.numel() for tensor in objects))
        assert found.maps["cat"].any()
    # A map of the smallest layer has 16 numbers; seven belong to the scheduler's timesteps.
    assert sizes[1] - sizes[0] < 16


def test_only_the_columns_of_the_words_are_computed(pipe, monkeypatch):
    from sefi_fast.attention import processor

    columns, fused = set(), processor.fused_cross_attention

    def watched(*args, **kwargs):
        result = fused(*args, **kwargs)
        columns.add(result.attn_probs.shape[1])
        return result

    monkeypatch.setattr(processor, "fused_cross_attention", watched)
    with trace(pipe, ["cat", "snow"]):
        sample(pipe, "a cat in the snow")
    assert columns == {2}


def test_maps_are_those_of_the_latest_call_and_stay(pipe):
    with trace(pipe, ["cat"]) as found:
        with pytest.raises(ValueError, match="nothing was traced"):
            _ = found.maps
        sample(pipe, "a photo of a cat")
        sample(pipe, ["a cat", "the cat"])
        assert found.maps["cat"].shape == (2, 16, 16)
    second = found.maps["cat"]
    with trace(pipe, ["cat"]) as found:
        sample(pipe, ["a cat", "the cat"])
    assert torch.equal(found.maps["cat"], second)


def test_wrong_words_and_batches_are_refused(pipe):
    absent = pytest.raises(PromptError, match="'dog' to trace is not in the prompt")
    with absent, trace(pipe, ["cat", "dog"]):
        sample(pipe, "a cat")
    for words in ([], ["cat", "cat"]):
        with pytest.raises(ValueError, match="at least one word"), trace(pipe, words):
            pass
    foreign = pytest.raises(ModelError, match="batch of 3 where the prompts make 2")
    with foreign, trace(pipe, ["cat"]):
        encode_prompt(pipe, "a cat")
        pipe.unet(torch.randn(3, 4, 16, 16), 10, torch.randn(3, 77, 48))


def test_overlays_and_grids_of_a_traced_call(pipe):
    arguments = {"num_inference_steps": 2, "num_images_per_prompt": 2, "height": 64, "width": 128}
    with trace(pipe, ["cat", "snow"]) as found:
        images = pipe("a cat in the snow", **arguments).images
    first, second = (found.overlay(images[0], "cat", index) for index in (0, 1))
    assert first.size == images[0].size == (128, 64)
    assert first.mode == "RGB" and first != second
    assert found.overlay(images[0].convert("L"), "cat").size == (128, 64)
    grid = found.grid(images)
    assert grid.width > 3 * 128 and grid.height > 2 * 64
    assert found.grid(images, ["snow"]).width < grid.width
    with pytest.raises(KeyError, match="'dog' was not traced"):
        found.overlay(images[0], "dog")
    with pytest.raises(IndexError, match="no sample 2"):
        found.overlay(images[0], "cat", 2)
    with pytest.raises(ValueError, match="no images"):
        found.grid([])


def test_an_overlay_is_hot_where_the_map_is(pipe):
    with trace(pipe, ["cat"]) as found:
        sample(pipe, "a cat")
    drawn = found.overlay(Image.new("RGB", (128, 128), (90, 90, 90)), "cat")
    heat = np.asarray(drawn.resize((16, 16), Image.Resampling.BOX)).sum(-1).ravel()
    order = found.maps["cat"][0].ravel().numpy()
    assert np.corrcoef(heat, order)[0, 1] > 0.9
