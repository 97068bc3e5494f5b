"""Traced maps against full maps computed beside the layers, and the state a trace leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import HeunDiscreteScheduler, StableDiffusionControlNetImg2ImgPipeline
from models import make_controlnet
from PIL import Image
from pipelines.sampling import draw, state_of, unet_in_another_thread

import sefi_fast
from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.pipelines import attach, detach, trace
from sefi_fast.pipelines.tracing import draw_overlay


class FullMaps:
    """Full maps of every cross-attention call, from the layers' own inputs."""

    def __init__(self, pipe, height, width):
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

    def word(self, positions, samples):
        """[samples, h, w]: mean over layers and steps of the sum over a word's columns."""
        total = 0
        for probabilities in self.calls:
            column = probabilities[-samples:, :, positions].sum(-1)
            factor = next(
                f
                for f in (1, 2, 4, 8)
                if -(-self.size[0] // f) * -(-self.size[1] // f) == column.shape[1]
            )
            column = column.unflatten(1, [-(-n // factor) for n in self.size])[:, None]
            resized = F.interpolate(column, self.size, mode="bilinear", align_corners=False)
            total = total + resized[:, 0]
        for handle in self.handles:
            handle.remove()
        return total / len(self.calls)


def check(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("size", [(128, 128), (64, 128), (104, 72)])
def test_maps_of_a_bare_pipeline(sd15_pipeline, guidance, size):
    pipe = sd15_pipeline
    height, width = size
    arguments = {"height": height, "width": width, "guidance_scale": guidance}
    picture = draw(pipe, "a photo of a cat on the beach", **arguments)
    full = FullMaps(pipe, height, width)
    with trace(pipe, ["cat", "beach"]) as found:
        traced = draw(pipe, "a photo of a cat on the beach", **arguments)
    torch.testing.assert_close(traced, picture, rtol=0, atol=2e-4)
    assert list(found.maps) == ["cat", "beach"]
    assert found.maps["cat"].shape == (1, height // 8, width // 8)
    check(found.maps["cat"], full.word([5], 1))
    check(found.maps["beach"], full.word([8], 1))
    assert float(found.maps["cat"].min()) > 0 and float(found.maps["cat"].max()) < 1


def test_maps_of_attached_subjects_batches_and_several_pictures(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    attach(pipe, [make_subject(), make_subject("<me>", "person", stages=3)])
    prompts = ["a <it> in the snow", "the <me> with a <it> and a <it>"]
    full = FullMaps(pipe, 128, 128)
    with trace(pipe, ["<it>", "snow"]) as found:
        draw(pipe, prompts, num_images_per_prompt=2, negative_prompt=["a <it>", "a red <it>"])
    it = torch.cat([full.word([2], 4)[:2], full.word([5, 8], 4)[2:]])
    check(found.maps["<it>"], it)
    check(found.maps["snow"][:2], full.word([5], 4)[:2])
    assert not found.maps["snow"][2:].any()


def test_a_word_of_several_tokens_is_their_sum(sd15_pipeline):
    pipe = sd15_pipeline
    tokens = pipe.tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(tokens) > 1
    full = FullMaps(pipe, 128, 128)
    with trace(pipe, "zebra") as found:
        draw(pipe, "a zebra")
    check(found.maps["zebra"], full.word(list(range(2, 2 + len(tokens))), 1))


def test_schedulers_that_call_the_unet_twice_a_step(sd15_pipeline):
    pipe = sd15_pipeline
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    full = FullMaps(pipe, 128, 128)
    with trace(pipe, ["dog"]) as found:
        draw(pipe, "a dog", num_inference_steps=3)
    check(found.maps["dog"], full.word([2], 1))


def test_maps_beside_a_controlnet_and_of_a_picture_changed(sd15_pipeline, make_subject):
    hint = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(9))
    parts = sd15_pipeline.components | {"controlnet": make_controlnet(sd15_pipeline.unet, seed=1)}
    arguments = {"image": hint, "control_image": 1 - hint, "strength": 1.0}
    pipe = StableDiffusionControlNetImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    attach(pipe, make_subject())
    picture = draw(pipe, "a <it> in the snow", num_images_per_prompt=2, **arguments)
    full = FullMaps(pipe, 64, 128)
    with trace(pipe, ["<it>", "snow"]) as found:
        traced = draw(pipe, "a <it> in the snow", num_images_per_prompt=2, **arguments)
    torch.testing.assert_close(traced, picture, rtol=0, atol=2e-4)
    check(found.maps["<it>"], full.word([2], 2))
    check(found.maps["snow"], full.word([5], 2))


def test_memory_does_not_grow_with_steps(sd15_pipeline):
    held = []
    for steps in (2, 9):
        with trace(sd15_pipeline, ["cat"]) as found:
            draw(sd15_pipeline, "a cat", num_inference_steps=steps)
        held.append(sum(sums.numel() for sums in found._latest.sums.values()))
    # One map a size: 16² + 8² + 4² + 2² of a 16 × 16 latent.
    assert held == [340, 340]


def test_only_the_columns_asked_for_are_ever_made(sd15_pipeline, monkeypatch):
    from sefi_fast.attention import processor

    columns, fused = set(), processor.fused_cross_attention

    def watched(*args, **kwargs):
        result = fused(*args, **kwargs)
        columns.add(result.attn_probs.shape[1])
        return result

    monkeypatch.setattr(processor, "fused_cross_attention", watched)
    with trace(sd15_pipeline, ["cat", "snow"]):
        draw(sd15_pipeline, "a cat in the snow")
    assert columns == {2}


@pytest.mark.parametrize("attached", [False, True])
def test_everything_is_restored_on_exit_and_on_errors(sd15_pipeline, make_subject, attached):
    pipe = sd15_pipeline
    draw(pipe, "a cat")
    if attached:
        attach(pipe, make_subject())
    before = state_of(pipe)
    with trace(pipe, ["cat"]):
        draw(pipe, "a cat")
    assert state_of(pipe) == before
    with pytest.raises(RuntimeError, match="stop"), trace(pipe, ["cat"]):
        raise RuntimeError("stop")
    assert state_of(pipe) == before

    def fail(*args):
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"), trace(pipe, ["cat"]):
        draw(pipe, "a cat", callback_on_step_end=fail)
    assert state_of(pipe) == before


def test_attaching_and_detaching_inside_a_trace(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    draw(pipe, "a cat")
    before = state_of(pipe)
    with trace(pipe, ["<it>"]) as found:
        attach(pipe, make_subject())
        draw(pipe, "a <it>")
    assert found.maps["<it>"].shape == (1, 16, 16)
    assert pipe.encode_prompt.subjects
    with trace(pipe, ["cat"]) as found:
        detach(pipe)
        draw(pipe, "a cat")
    assert found.maps["cat"].any()
    assert state_of(pipe) == before


def test_maps_are_those_of_the_latest_call_and_stay(sd15_pipeline):
    pipe = sd15_pipeline
    with trace(pipe, ["cat"]) as found:
        with pytest.raises(ValueError, match="nothing was traced"):
            _ = found.maps
        draw(pipe, "a photo of a cat")
        draw(pipe, ["a cat", "the cat"])
        assert found.maps["cat"].shape == (2, 16, 16)
    second = found.maps["cat"]
    with trace(pipe, ["cat"]) as found:
        draw(pipe, ["a cat", "the cat"])
    assert torch.equal(found.maps["cat"], second)


def test_wrong_uses_are_told_in_words(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    draw(pipe, "a cat")
    before = state_of(pipe)
    absent = pytest.raises(PromptError, match="'dog' to trace is not in the prompt")
    with absent, trace(pipe, ["cat", "dog"]):
        draw(pipe, "a cat")
    with pytest.raises(PromptError, match="give it as text"), trace(pipe, ["cat"]):
        draw(pipe, None, prompt_embeds=torch.zeros(1, 77, 48))
    for words in ([], ["cat", "cat"]):
        with pytest.raises(ValueError, match="at least one word"), trace(pipe, words):
            pass
    nested = pytest.raises(ValueError, match="already run")
    with trace(pipe, ["cat"]), nested, trace(pipe, ["dog"]):
        pass
    with pytest.raises(ModelError, match="U-Net of type"), trace(object(), ["cat"]):
        pass
    foreign = pytest.raises(ModelError, match="batch of 3 where the prompts make 2")
    with foreign, trace(pipe, ["cat"]):
        pipe.encode_prompt("a cat", torch.device("cpu"), 1, True)
        pipe.unet(torch.randn(3, 4, 16, 16), 10, torch.randn(3, 77, 48))
    assert state_of(pipe) == before
    compiled = torch.compile(pipe.unet)
    pipe.unet = compiled
    with pytest.raises(ModelError, match="compiled"), trace(pipe, ["cat"]):
        pass


def test_other_threads_go_on_undisturbed(sd15_pipeline):
    pipe = sd15_pipeline
    expected, results, work_between_steps = unet_in_another_thread(pipe)

    with trace(pipe, ["cat"]) as found:
        draw(pipe, "a cat", callback_on_step_end=work_between_steps)
        alone = found.maps["cat"]
    with trace(pipe, ["cat"]) as found:
        draw(pipe, "a cat")
    torch.testing.assert_close(alone, found.maps["cat"])
    assert len(results) == 4
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_overlays_keep_the_size_and_are_hot_where_the_word_is():
    picture = Image.new("RGB", (96, 64), (90, 90, 90))
    attention = torch.full((8, 12), 0.01)
    attention[2, 9] = 0.3
    drawn = draw_overlay(picture, attention)
    assert drawn.size == picture.size and drawn.mode == "RGB"
    brightness = np.asarray(drawn).sum(-1)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert abs(row - 20) <= 4 and abs(column - 76) <= 4
    draw_overlay(picture.convert("L"), torch.zeros(8, 12))


def test_overlay_and_grid_of_a_traced_call(sd15_pipeline):
    pipe = sd15_pipeline
    with trace(pipe, ["cat", "snow"]) as found:
        images = pipe(
            "a cat in the snow",
            num_inference_steps=2,
            num_images_per_prompt=2,
            height=64,
            width=128,
        ).images
    first, second = (found.overlay(images[0], "cat", index) for index in (0, 1))
    assert first.size == images[0].size == (128, 64)
    assert first != second
    grid = found.grid(images)
    assert grid.width > 3 * 128 and grid.height > 2 * 64
    assert found.grid(images, ["snow"]).width < grid.width
    with pytest.raises(KeyError, match="'dog' was not traced"):
        found.overlay(images[0], "dog")
    with pytest.raises(IndexError, match="no sample 2"):
        found.overlay(images[0], "cat", 2)
    with pytest.raises(ValueError, match="no images"):
        found.grid([])


def test_the_package_hands_trace_on():
    assert sefi_fast.trace is trace
