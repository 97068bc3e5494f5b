"""Regions against attention masked by hand, and against the same prompt for the whole image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoPipelineForText2Image
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from models import make_controlnet
from PIL import Image
from pipelines.sampling import draw, state_of, subject_for, unet_in_another_thread

import sefi_fast
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.pipelines import attach, detach, regions, trace
from sefi_fast.prompts import encode_with_pooled

WHOLE = (0, 0, 1, 1)
PICTURE = "a dog on the beach"


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
        for y in range(height):
            for x in range(width):
                for number, (left, top, right, bottom) in enumerate(self.boxes, 1):
                    if left * width <= x + 0.5 < right * width and (
                        top * height <= y + 0.5 < bottom * height
                    ):
                        owner[y, x] = number
        return owner.flatten()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        prompt, mask = hidden_states, None
        if encoder_hidden_states is not None:
            negative, positive = encoder_hidden_states.chunk(2)
            everywhere = torch.cat([negative, *[negative] * len(self.prompts)], 1)
            placed = torch.cat([positive, *self.prompts], 1)
            prompt = torch.cat([everywhere, placed])
            owner = self.owner(hidden_states.shape[1])
            keys = torch.arange(len(self.prompts) + 1).repeat_interleave(77)
            mask = owner[:, None] == keys
        projected = (attn.to_q(hidden_states), attn.to_k(prompt), attn.to_v(prompt))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        output = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return attn.to_out[0](output)


@pytest.mark.parametrize("size", [(128, 128), (64, 128), (104, 72)])
def test_each_place_sees_its_own_prompt_alone(sd15_pipeline, size):
    pipe, (height, width) = sd15_pipeline, size
    given = {"a cat": (0, 0, 0.5, 1), "a bear in the snow": (0.3, 0.4, 1, 0.8)}
    own = [pipe.encode_prompt(text, torch.device("cpu"), 1, False)[0] for text in given]
    replaced = dict(pipe.unet.attn_processors)
    by_hand = MaskedAttention(own, list(given.values()), (height // 8, width // 8))
    pipe.unet.set_attn_processor(by_hand)
    expected = draw(pipe, PICTURE, height=height, width=width)
    pipe.unet.set_attn_processor(replaced)
    with regions(pipe, given):
        actual = draw(pipe, PICTURE, height=height, width=width)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
    assert (draw(pipe, PICTURE, height=height, width=width) - actual).abs().max() > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_subject_in_a_region_over_all_is_the_prompt_of_the_picture(sd15_pipeline, guidance):
    pipe = sd15_pipeline
    attach(pipe, [subject_for(pipe), subject_for(pipe, "<b>", "bear", stages=10, split=False)])
    prompt = "a photo of a <it> and a <b>"
    expected = draw(pipe, prompt, num_inference_steps=7, guidance_scale=guidance)
    with regions(pipe, {prompt: WHOLE}):
        for picture in (PICTURE, "a <b>"):
            actual = draw(pipe, picture, num_inference_steps=7, guidance_scale=guidance)
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


def test_where_boxes_overlap_the_later_one_counts(sd15_pipeline):
    pipe = sd15_pipeline
    with regions(pipe, [("a cat", WHOLE), ("a bear", WHOLE)]):
        actual = draw(pipe, PICTURE)
    torch.testing.assert_close(actual, draw(pipe, "a bear"), rtol=0, atol=2e-4)


def test_a_box_without_an_image_token_changes_nothing(sd15_pipeline):
    pipe = sd15_pipeline
    with regions(pipe, {"a bear": (0.95, 0.95, 0.96, 0.96)}):
        actual = draw(pipe, PICTURE)
    torch.testing.assert_close(actual, draw(pipe, PICTURE), rtol=0, atol=2e-4)


def test_every_picture_of_a_batch_has_the_regions(sd15_pipeline):
    pipe = sd15_pipeline
    given = {"a bear": (0, 0, 1, 0.5)}
    pictures = [PICTURE, "a person in the snow"]
    with regions(pipe, given):
        together = draw(pipe, pictures, num_images_per_prompt=2)
    for number, picture in enumerate(pictures):
        for image in range(2):
            seed = 2 * number + image
            with regions(pipe, given):
                alone = draw(pipe, picture, seed=seed)
            torch.testing.assert_close(together[seed : seed + 1], alone, rtol=0, atol=2e-4)


@pytest.mark.parametrize("guess_mode", [False, True])
def test_they_reach_controlnets(sd15_pipeline, guess_mode):
    plain = sd15_pipeline
    net = make_controlnet(plain.unet)
    pipe = AutoPipelineForText2Image.from_pipe(plain, controlnet=net)
    attach(pipe, subject_for(pipe))
    hint = Image.effect_noise((128, 128), 80).convert("RGB")
    settings = {"image": hint, "guess_mode": guess_mode, "num_inference_steps": 7}
    expected = draw(pipe, "a <it>", **settings)
    with regions(pipe, {"a <it>": WHOLE}):
        actual = draw(pipe, PICTURE, **settings)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
    assert (draw(pipe, PICTURE, **settings) - actual).abs().max() > 1e-2


def test_sdxl_keeps_the_pooled_embedding_of_the_picture(sdxl_pipeline):
    pipe = sdxl_pipeline
    attach(pipe, subject_for(pipe))
    region, picture = (encode_with_pooled(pipe, text) for text in ("a <it>", PICTURE))
    negative = encode_with_pooled(pipe, "")
    expected = draw(
        pipe,
        None,
        prompt_embeds=region.prompt_embeds,
        pooled_prompt_embeds=picture.pooled_prompt_embeds,
        negative_prompt_embeds=negative.prompt_embeds,
        negative_pooled_prompt_embeds=negative.pooled_prompt_embeds,
    )
    with regions(pipe, {"a <it>": WHOLE}):
        actual = draw(pipe, PICTURE, negative_prompt="")
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


def test_everything_is_restored_on_exit_and_on_errors(sd15_pipeline):
    pipe = sd15_pipeline
    draw(pipe, "a cat")
    bare = state_of(pipe)
    with regions(pipe, {"a bear": WHOLE}):
        draw(pipe, "a cat")
    assert state_of(pipe) == bare
    attach(pipe, subject_for(pipe))
    attached = state_of(pipe)
    with pytest.raises(RuntimeError, match="stop"), regions(pipe, {"a <it>": WHOLE}):
        draw(pipe, "a cat")
        raise RuntimeError("stop")
    assert state_of(pipe) == attached
    with regions(pipe, {"a bear": WHOLE}):
        detach(pipe)
        draw(pipe, "a cat")
    assert state_of(pipe) == bare


def test_other_threads_go_on_undisturbed(sd15_pipeline):
    pipe = sd15_pipeline
    expected, results, work_between_steps = unet_in_another_thread(pipe)

    with regions(pipe, {"a bear": WHOLE}):
        disturbed = draw(pipe, "a cat", callback_on_step_end=work_between_steps)
    torch.testing.assert_close(disturbed, draw(pipe, "a bear"), rtol=0, atol=2e-4)
    assert len(results) == 4
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", ["a <it> and a bear", "a bear"])
def test_they_are_encoded_as_the_call_encodes_its_own(sdxl_pipeline, prompt):
    pipe = sdxl_pipeline
    attach(pipe, subject_for(pipe))
    expected = draw(pipe, prompt, clip_skip=1)
    with regions(pipe, {prompt: WHOLE}):
        actual = draw(pipe, prompt, clip_skip=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
    assert (draw(pipe, prompt) - expected).abs().max() > 1e-2


def test_other_pipelines_of_the_same_unet_are_left_alone(sd15_pipeline):
    pipe = sd15_pipeline
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected = draw(other, "a cat")
    with regions(pipe, {"a bear": WHOLE}):
        draw(pipe, PICTURE)
        torch.testing.assert_close(draw(other, "a cat"), expected, rtol=0, atol=2e-4)


def test_a_call_of_the_unet_on_other_prompts_is_refused(sd15_pipeline):
    pipe = sd15_pipeline

    def half(pipe, step, timestep, tensors):
        # What self-attention guidance does: the negative half once more.
        pipe.unet(tensors["latents"], timestep, torch.zeros(1, 77, 48))
        return tensors

    with (
        pytest.raises(ModelError, match=r"batch of 1 for 1 image"),
        regions(pipe, {"a bear": WHOLE}),
    ):
        draw(pipe, PICTURE, callback_on_step_end=half)


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
def test_image_tokens_that_are_not_in_their_places_are_refused(sd15_pipeline, change, box):
    pipe = sd15_pipeline
    layers = [m for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False)]
    change(pipe.unet, layers[0])
    with (
        pytest.raises(ModelError, match=r"image tokens instead of \d+×\d+.*Turn off"),
        regions(pipe, {"a bear": box}),
    ):
        draw(pipe, PICTURE)


def test_a_prompt_that_is_replaced_before_the_layers_is_refused(sd15_pipeline):
    pipe = sd15_pipeline
    with regions(pipe, {"a bear": WHOLE}):
        draw(pipe, PICTURE)
        projection = pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] * 2},
            ),
            with_kwargs=True,
        )
        with pytest.raises(ModelError, match="no cross-attention layer of UNet2DConditionModel"):
            draw(pipe, PICTURE)
        projection.remove()


def test_what_they_cannot_reach_is_refused(sd15_pipeline):
    pipe = sd15_pipeline
    net = make_controlnet(pipe.unet)
    steered = AutoPipelineForText2Image.from_pipe(pipe, controlnet=net)
    net.mid_block.compile()
    refused = pytest.raises(ModelError, match="ControlNetModel is compiled")
    with refused, regions(steered, {"a bear": WHOLE}):
        pass
    layers = [m for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False)]
    adapter = IPAdapterAttnProcessor2_0(layers[0].query_dim, 48)
    layers[0].set_processor(adapter)
    refused = pytest.raises(ModelError, match=r"knows no regions: unload an IP-Adapter")
    with refused, regions(pipe, {"a bear": WHOLE}):
        draw(pipe, PICTURE)


def test_wrong_uses_are_told_in_words(sd15_pipeline):
    pipe = sd15_pipeline
    draw(pipe, "a cat")
    before = state_of(pipe)
    cases = [
        ({}, ValueError, "there is no region"),
        ({"a cat": (0, 0, 1)}, TypeError, "must be four numbers"),
        ({"a cat": "0,0,1,1"}, TypeError, "must be four numbers"),
        ({"a cat": (0.5, 0, 0.5, 1)}, ValueError, r"must lie within \(0, 0, 1, 1\)"),
        ({"a cat": (0, 0, 1, 1.5)}, ValueError, r"must lie within \(0, 0, 1, 1\)"),
        ([(["a cat"], WHOLE)], TypeError, "must be one sentence"),
        ([("a cat", *WHOLE)], TypeError, "a region is a prompt and its box"),
        ("a cat", TypeError, "a region is a prompt and its box"),
    ]
    for given, error, words in cases:
        with pytest.raises(error, match=words), regions(pipe, given):
            pass
    with pytest.raises(PromptError, match="give them as text"), regions(pipe, {"a cat": WHOLE}):
        draw(pipe, None, prompt_embeds=torch.zeros(1, 77, 48))
    nested = pytest.raises(ValueError, match="already run")
    with trace(pipe, ["cat"]), nested, regions(pipe, {"a cat": WHOLE}):
        pass
    with regions(pipe, {"a cat": WHOLE}), nested, trace(pipe, ["cat"]):
        pass
    assert state_of(pipe) == before
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ModelError, match="compiled"), regions(pipe, {"a cat": WHOLE}):
        pass


def test_the_package_hands_regions_on():
    assert sefi_fast.regions is regions
