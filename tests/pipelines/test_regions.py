"""Regions against attention masked by hand, and against the same prompt for the whole image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoPipelineForText2Image
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from models import make_controlnet
from pipelines.sampling import (
    HINT,
    assert_close,
    assert_differ,
    attend,
    encode_prompt,
    sample,
)

from sefi_fast import attach, regions
from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.errors import ModelError
from sefi_fast.prompts import encode_with_pooled

WHOLE = (0, 0, 1, 1)
IMAGE = "a dog on the beach"


class MaskedAttention:
    """All prompts' keys in one row, of which each query sees those of its own prompt alone."""

    def __init__(self, prompts, boxes, size):
        self.prompts, self.boxes, self.size = prompts, boxes, size

    def owner(self, queries):
        """Number of the prompt of each image token, 0 for the image's own."""
        height, width = self.size
        while height * width > queries:
            height, width = -(-height // 2), -(-width // 2)
        owner = torch.zeros(height, width, dtype=torch.long)
        y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
        for number, (left, top, right, bottom) in enumerate(self.boxes, 1):
            owner[((top <= y) & (y < bottom))[:, None] & (left <= x) & (x < right)] = number
        return owner.flatten()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        prompt, mask = hidden_states, None
        if encoder_hidden_states is not None:
            negative, positive = encoder_hidden_states.chunk(2)
            everywhere = torch.cat([negative, *[negative] * len(self.prompts)], 1)
            prompt = torch.cat([everywhere, torch.cat([positive, *self.prompts], 1)])
            owner = self.owner(hidden_states.shape[1])
            mask = owner[:, None] == torch.arange(len(self.prompts) + 1).repeat_interleave(77)
        return attend(attn, hidden_states, prompt, prompt, mask)


@pytest.mark.parametrize("size", [(128, 128), (64, 128), (104, 72)])
def test_each_place_sees_its_own_prompt_alone(pipe, size):
    height, width = size
    given = {"a cat": (0, 0, 0.5, 1), "a bear in the snow": (0.3, 0.4, 1, 0.8)}
    own = [encode_prompt(pipe, text, guidance=False)[0] for text in given]
    replaced = dict(pipe.unet.attn_processors)
    by_hand = MaskedAttention(own, list(given.values()), (height // 8, width // 8))
    pipe.unet.set_attn_processor(by_hand)
    expected = sample(pipe, IMAGE, height=height, width=width)
    pipe.unet.set_attn_processor(replaced)
    with regions(pipe, given):
        actual = sample(pipe, IMAGE, height=height, width=width)
    assert_close(actual, expected)
    assert_differ(sample(pipe, IMAGE, height=height, width=width), actual)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_subject_in_a_region_over_all_is_the_prompt_of_the_image(pipe, make_subject, guidance):
    attach(pipe, [make_subject(), make_subject("<b>", "bear", stages=10, split=False)])
    prompt = "a photo of a <it> and a <b>"
    arguments = {"num_inference_steps": 7, "guidance_scale": guidance}
    expected = sample(pipe, prompt, **arguments)
    with regions(pipe, {prompt: WHOLE}):
        for image in (IMAGE, "a <b>"):
            assert_close(sample(pipe, image, **arguments), expected)


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ([("a cat", WHOLE), ("a bear", WHOLE)], "a bear"),
        # A box without the centre of an image token.
        ([("a bear", (0.95, 0.95, 0.96, 0.96))], IMAGE),
    ],
)
def test_the_later_of_overlapping_boxes_counts_and_a_tiny_one_does_not(pipe, given, prompt):
    with regions(pipe, given):
        actual = sample(pipe, IMAGE)
    assert_close(actual, sample(pipe, prompt))


def test_every_image_of_a_batch_has_the_regions(pipe):
    prompts = [IMAGE, "a person in the snow"]
    with regions(pipe, {"a bear": (0, 0, 1, 0.5)}):
        together = sample(pipe, prompts, num_images_per_prompt=2)
        for index in range(4):
            alone = sample(pipe, prompts[index // 2], seed=index)
            assert_close(together[index : index + 1], alone)


@pytest.mark.parametrize("guess_mode", [False, True])
def test_they_reach_controlnets(pipe, make_subject, guess_mode):
    pipe = AutoPipelineForText2Image.from_pipe(pipe, controlnet=make_controlnet(pipe.unet))
    attach(pipe, make_subject())
    settings = {"image": HINT, "guess_mode": guess_mode, "num_inference_steps": 7}
    expected = sample(pipe, "a <it>", **settings)
    with regions(pipe, {"a <it>": WHOLE}):
        actual = sample(pipe, IMAGE, **settings)
    assert_close(actual, expected)
    assert_differ(sample(pipe, IMAGE, **settings), actual)


@pytest.mark.parametrize("family", ["sdxl"])
def test_sdxl_keeps_the_pooled_embedding_of_the_image(pipe, make_subject):
    attach(pipe, make_subject())
    region, image, negative = (encode_with_pooled(pipe, text) for text in ("a <it>", IMAGE, ""))
    expected = sample(
        pipe,
        None,
        prompt_embeds=region.prompt_embeds,
        pooled_prompt_embeds=image.pooled_prompt_embeds,
        negative_prompt_embeds=negative.prompt_embeds,
        negative_pooled_prompt_embeds=negative.pooled_prompt_embeds,
    )
    with regions(pipe, {"a <it>": WHOLE}):
        assert_close(sample(pipe, IMAGE, negative_prompt=""), expected)


@pytest.mark.parametrize("family", ["sdxl"])
@pytest.mark.parametrize("prompt", ["a <it> and a bear", "a bear"])
def test_they_are_encoded_as_the_call_encodes_its_own_prompt(pipe, make_subject, prompt):
    attach(pipe, make_subject())
    expected = sample(pipe, prompt, clip_skip=1)
    with regions(pipe, {prompt: WHOLE}):
        assert_close(sample(pipe, prompt, clip_skip=1), expected)
    assert_differ(sample(pipe, prompt), expected)


def merge_tokens(unet, layer):
    """Every second image token of one cross-attention, its output repeated: as token merging."""
    forward = layer.forward

    def merged(hidden_states, *args, **kwargs):
        return forward(hidden_states[:, ::2], *args, **kwargs).repeat_interleave(2, dim=1)

    layer.forward = merged


def tile(unet, layer):
    """Each half of the image tokens as a sample of its own: as HyperTile."""
    forward = layer.forward

    def tiled(hidden_states, encoder_hidden_states, **kwargs):
        halves = hidden_states.unflatten(1, (2, -1)).flatten(0, 1)
        prompt = encoder_hidden_states.repeat_interleave(2, 0)
        # Some implementations carry a tensor's attributes along.
        prompt.__dict__.update(encoder_hidden_states.__dict__)
        return forward(halves, prompt, **kwargs).unflatten(0, (-1, 2)).flatten(1, 2)

    layer.forward = tiled


def shrink_deeply(unet, layer):
    """Half the size in all but the outermost blocks: as deep shrink."""
    block, last = unet.down_blocks[1], unet.up_blocks[-2]

    def down(module, args, kwargs):
        kwargs["hidden_states"] = F.interpolate(kwargs["hidden_states"], scale_factor=0.5)
        return args, kwargs

    block.register_forward_pre_hook(down, with_kwargs=True)
    last.register_forward_hook(lambda module, args, output: F.interpolate(output, scale_factor=2))


@pytest.mark.parametrize("change", [merge_tokens, tile, shrink_deeply])
@pytest.mark.parametrize("box", [(0, 0, 0.4, 0.4), (0.2, 0.2, 1, 1)])
def test_image_tokens_that_are_not_in_their_places_are_refused(pipe, change, box):
    change(pipe.unet, next(iter(cross_attention_layers(pipe.unet).values())))
    refused = pytest.raises(ModelError, match=r"image tokens instead of \d+×\d+.*Turn off")
    with refused, regions(pipe, {"a bear": box}):
        sample(pipe, IMAGE)


def call_half_a_batch(pipe):
    """What self-attention guidance does: the negative half once more."""

    def half(pipe, step, timestep, tensors):
        pipe.unet(tensors["latents"], timestep, torch.zeros(1, 77, 48))
        return tensors

    return {"callback_on_step_end": half}


def replace_prompt(pipe):
    def double(module, args, kwargs):
        return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] * 2}

    pipe.unet.register_forward_pre_hook(double, with_kwargs=True)
    return {}


def load_ip_adapter_processor(pipe):
    layer = next(iter(cross_attention_layers(pipe.unet).values()))
    layer.set_processor(IPAdapterAttnProcessor2_0(layer.query_dim, 48))
    return {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (call_half_a_batch, "batch of 1 for 1 image"),
        (replace_prompt, "no cross-attention layer of UNet2DConditionModel"),
        (load_ip_adapter_processor, "knows no regions: unload an IP-Adapter"),
    ],
)
def test_prompts_that_cannot_reach_the_layers_are_refused(pipe, change, words):
    with regions(pipe, {"a bear": WHOLE}):
        sample(pipe, IMAGE, num_inference_steps=1)
        arguments = change(pipe)
        with pytest.raises(ModelError, match=words):
            sample(pipe, IMAGE, **arguments)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ValueError, "there is no region"),
        ({"a cat": (0, 0, 1)}, TypeError, "must be four numbers"),
        ({"a cat": "0,0,1,1"}, TypeError, "must be four numbers"),
        ({"a cat": (0.5, 0, 0.5, 1)}, ValueError, r"must lie within \(0, 0, 1, 1\)"),
        ({"a cat": (0, 0, 1, 1.5)}, ValueError, r"must lie within \(0, 0, 1, 1\)"),
        ([(["a cat"], WHOLE)], TypeError, "must be one sentence"),
        ([("a cat", *WHOLE)], TypeError, "a region is a prompt and its box"),
        ("a cat", TypeError, "a region is a prompt and its box"),
    ],
)
def test_wrong_regions_are_refused(pipe, given, error, words):
    with pytest.raises(error, match=words), regions(pipe, given):
        pass
