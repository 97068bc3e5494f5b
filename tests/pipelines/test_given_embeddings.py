"""Weighted embeddings and long prompts: what a user may hand over in place of a short sentence."""

from __future__ import annotations

import logging

import pytest
import torch
from pipelines.sampling import draw, subject_for

from sefi_fast import attach
from sefi_fast.errors import PromptError
from sefi_fast.prompts import encode, encode_with_pooled, pack, unpack

CLOSE = {"rtol": 0, "atol": 1e-3}
PIPELINES = ["sd15_pipeline", "sdxl_pipeline"]


@pytest.fixture(params=PIPELINES)
def pipe(request):
    return request.getfixturevalue(request.param)


def plain(pipe, text: str) -> dict[str, torch.Tensor]:
    """Embeddings as the pipeline's own encode_prompt makes them."""
    with torch.no_grad():
        own = pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1,
                                 do_classifier_free_guidance=False)  # fmt: skip
    named = {"prompt_embeds": own[0]}
    return named | ({"pooled_prompt_embeds": own[2]} if len(own) > 2 else {})


def weighted(embeds: torch.Tensor, position: int, weight: float) -> torch.Tensor:
    """One token's row scaled, as prompt weighting does; rows are the last axis but one."""
    scaled = embeds.clone()
    scaled[..., position, :] *= weight
    return scaled


def test_weighted_words_beside_attached_subjects(pipe):
    given = plain(pipe, "a red cat")
    given["prompt_embeds"] = weighted(given["prompt_embeds"], 2, 1.6)
    expected = draw(pipe, None, **given)
    assert (expected - draw(pipe, "a red cat")).abs().max() > 1e-2
    attach(pipe, subject_for(pipe))
    torch.testing.assert_close(draw(pipe, None, **given), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("position", [2, 3])
def test_weights_in_a_prompt_with_a_subject(pipe, position):
    """The word before the subject, and the subject itself: in every stage and both streams."""
    given = plain(pipe, "a red cat")
    given["prompt_embeds"] = weighted(given["prompt_embeds"], position, 1.6)
    expected = draw(pipe, None, **given)
    attach(pipe, subject_for(pipe, distance=0))
    packed = encode_with_pooled(pipe, "a red <it>")
    width = pipe.unet.config.cross_attention_dim
    streams = weighted(unpack(packed.prompt_embeds, width), position, 1.6)
    ours = packed._replace(prompt_embeds=pack(streams))._asdict()
    actual = draw(pipe, None, **{name: x for name, x in ours.items() if x is not None})
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_a_long_prompt_is_cut_where_diffusers_cuts_it(pipe, caplog):
    tail = "red hat and " * 30
    expected = draw(pipe, f"a cat with a {tail}")
    attach(pipe, subject_for(pipe, distance=0))
    with caplog.at_level(logging.WARNING, logger="sefi_fast"):
        actual = draw(pipe, f"a <it> with a {tail}")
    assert "cut after 75 tokens" in caplog.text
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_a_placeholder_beyond_the_cut_is_refused(pipe):
    attach(pipe, subject_for(pipe))
    with pytest.raises(PromptError, match="only the first 75 are used"):
        draw(pipe, "red hat and " * 30 + "a <it>")


def test_long_embeddings_pass_where_no_subject_stands(sd15_pipeline):
    pipe = sd15_pipeline
    long = torch.cat([plain(pipe, text)["prompt_embeds"] for text in ("a cat", "snow")], 1)
    empty = torch.cat([plain(pipe, "")["prompt_embeds"]] * 2, 1)
    given = {"prompt_embeds": long, "negative_prompt_embeds": empty}
    expected = draw(pipe, None, **given)
    attach(pipe, subject_for(pipe))
    torch.testing.assert_close(draw(pipe, None, **given), expected, rtol=0, atol=1e-4)
    with pytest.raises(PromptError, match="negative prompt 154 tokens"):
        draw(pipe, "a <it>", negative_prompt_embeds=long)


# Among them the lengths S·2·77 + 1 and the lengths of packed prompts along the other axis.
@pytest.mark.parametrize("length", [1, 76, 78, 97, 154, 155, 309, 463, 485, 771])
def test_plain_embeddings_of_any_length_are_plain(sd15_pipeline, length):
    pipe = sd15_pipeline
    short = {"num_inference_steps": 2, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(length)
    inputs = torch.randn(2, length, 48, generator=generator)
    inputs[1, -1] = 0
    cases = [inputs, torch.ones_like(inputs), torch.zeros_like(inputs), inputs * torch.nan]
    given = [{"prompt_embeds": x[:1], "negative_prompt_embeds": x[1:]} for x in cases]
    expected = [draw(pipe, None, **embeds, **short) for embeds in given]
    attach(pipe, subject_for(pipe))
    for embeds, bare in zip(given, expected, strict=True):
        actual = draw(pipe, None, **embeds, **short)
        torch.testing.assert_close(actual, bare, rtol=0, atol=1e-4, equal_nan=True)


def test_packed_embeddings_are_told_where_they_do_not_belong(sd15_pipeline, sdxl_pipeline):
    pipe = sd15_pipeline
    packed = encode(pipe, "a <it>", subjects=subject_for(pipe))
    foreign = encode(sdxl_pipeline, "a <it>", subjects=subject_for(sdxl_pipeline))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        draw(pipe, None, prompt_embeds=packed, guidance_scale=1)
    attach(pipe, subject_for(pipe))
    assert draw(pipe, None, prompt_embeds=packed, guidance_scale=1).isfinite().all()
    for wrong in (foreign, packed[..., :-1], packed[..., :96]):
        with pytest.raises(ValueError, match=r"takes \[B, M, 48\], or packed"):
            draw(pipe, None, prompt_embeds=wrong, guidance_scale=1)
        with pytest.raises(ValueError, match=r"takes \[B, M, 48\], or packed"):
            draw(pipe, "a <it>", negative_prompt_embeds=wrong)
    with pytest.raises(PromptError, match="Give prompt_embeds of one length"):
        draw(pipe, "a <it>", negative_prompt_embeds=torch.cat([packed, packed], 1))


def test_packed_embeddings_of_two_chunks_are_one_long_prompt(sd15_pipeline):
    pipe = sd15_pipeline
    long = torch.cat([plain(pipe, text)["prompt_embeds"] for text in ("a cat", "snow")], 1)
    expected = draw(pipe, None, prompt_embeds=long, guidance_scale=1)
    attach(pipe, subject_for(pipe, distance=0))
    packed = torch.cat([encode(pipe, text) for text in ("a <it>", "snow")], 1)
    actual = draw(pipe, None, prompt_embeds=packed, guidance_scale=1)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_a_negative_of_another_library_goes_with_a_prompt_in_words(sd15_pipeline):
    pipe = sd15_pipeline
    negative = torch.randn(1, 77, 48, generator=torch.Generator().manual_seed(0))
    expected = draw(pipe, "a photo of a cat", negative_prompt_embeds=negative)
    attach(pipe, subject_for(pipe, distance=0))
    actual = draw(pipe, "a photo of a <it>", negative_prompt_embeds=negative)
    torch.testing.assert_close(actual, expected, **CLOSE)
    with pytest.raises(ValueError, match="must have the same shape"):
        draw(pipe, None, prompt_embeds=encode(pipe, "a <it>"), negative_prompt_embeds=negative)
