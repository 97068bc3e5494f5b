"""Prompts given as tensors: weighted, long, packed before, and after text encoders were freed."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from pipelines.sampling import (
    assert_close,
    assert_differ,
    both_families,
    encode_prompt,
    sample,
    subject_for,
)

from sefi_fast import attach, detach, encode, regions, trace
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.prompts import encode_with_pooled, pack, unpack

PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def plain(pipe, text: str) -> dict[str, torch.Tensor]:
    """Embeddings as the pipeline's own encode_prompt makes them."""
    own = encode_prompt(pipe, text, guidance=False)
    return {"prompt_embeds": own[0]} | ({"pooled_prompt_embeds": own[2]} if own[2:] else {})


def packed(pipe, prompt: str, negative: str | None = None) -> dict[str, torch.Tensor]:
    """Arguments of the call in place of a prompt, and of a negative one if it is not None."""
    given = encode_with_pooled(pipe, prompt)._asdict()
    if negative is not None:
        other = encode_with_pooled(pipe, negative)._asdict()
        given |= {f"negative_{name}": value for name, value in other.items()}
    return {name: value for name, value in given.items() if value is not None}


def weighted(embeds: torch.Tensor, position: int) -> torch.Tensor:
    """One token's row scaled, as prompt weighting does; rows are the last axis but one."""
    scaled = embeds.clone()
    scaled[..., position, :] *= 1.6
    return scaled


def free(pipe, *names: str) -> None:
    for name in names:
        if hasattr(pipe, name):
            setattr(pipe, name, None)


@both_families
def test_packed_prompts_give_the_images_of_their_words(pipe, make_subject):
    attach(pipe, [make_subject(), make_subject("<me>", "man", stages=10)])
    several = {"num_images_per_prompt": 2}
    expected = sample(pipe, "a <it> in the snow", negative_prompt="a <me>", **several)
    given = packed(pipe, "a <it> in the snow", "a <me>")
    assert_close(sample(pipe, None, **given, **several), expected)
    given = packed(pipe, "a <it>")
    expected = sample(pipe, "a <it>")
    assert_close(sample(pipe, None, **given), expected)
    attach(pipe, make_subject("<other>", "dog", stages=3))
    assert_close(sample(pipe, None, **given), expected)


@both_families
@pytest.mark.parametrize("position", [2, 3])
def test_weighted_words_and_subjects(pipe, make_subject, position):
    """The word before the subject, and the subject itself: in every stage and both streams."""
    given = plain(pipe, "a red cat")
    given["prompt_embeds"] = weighted(given["prompt_embeds"], position)
    expected = sample(pipe, None, **given)
    assert_differ(expected, sample(pipe, "a red cat"))
    attach(pipe, make_subject(distance=0))
    assert_close(sample(pipe, None, **given), expected, 1e-4)
    ours = packed(pipe, "a red <it>")
    width = pipe.unet.config.cross_attention_dim
    ours["prompt_embeds"] = pack(weighted(unpack(ours["prompt_embeds"], width), position))
    assert_close(sample(pipe, None, **ours), expected)


@both_families
def test_a_long_prompt_is_cut_where_diffusers_cuts_it(pipe, make_subject, caplog):
    tail = "red hat and " * 30
    expected = sample(pipe, f"a cat with a {tail}")
    attach(pipe, make_subject(distance=0))
    with caplog.at_level(logging.WARNING, logger="sefi_fast"):
        actual = sample(pipe, f"a <it> with a {tail}")
    assert "cut after 75 tokens" in caplog.text
    assert_close(actual, expected)
    with pytest.raises(PromptError, match="only the first 75 are used"):
        sample(pipe, f"{tail} a <it>")


# Among them the lengths S·2·77 + 1 and the lengths of packed prompts along the other axis.
@pytest.mark.parametrize("length", [1, 76, 78, 97, 154, 155, 309, 463, 485, 771])
def test_plain_embeddings_of_any_length_are_plain(pipe, make_subject, length):
    short = {"num_inference_steps": 2, "height": 64, "width": 64}
    inputs = torch.randn(2, length, 48, generator=torch.Generator().manual_seed(length))
    inputs[1, -1] = 0
    cases = [inputs, torch.ones_like(inputs), torch.zeros_like(inputs), inputs * torch.nan]
    given = [{"prompt_embeds": x[:1], "negative_prompt_embeds": x[1:]} for x in cases]
    expected = [sample(pipe, None, **embeds, **short) for embeds in given]
    attach(pipe, make_subject())
    for embeds, bare in zip(given, expected, strict=True):
        actual = sample(pipe, None, **embeds, **short)
        torch.testing.assert_close(actual, bare, rtol=0, atol=1e-4, equal_nan=True)


def test_embeddings_that_do_not_fit_are_refused(pipe, make_subject, sdxl_pipeline):
    given = encode(pipe, "a <it>", subjects=make_subject())
    foreign = encode(sdxl_pipeline, "a <it>", subjects=subject_for(sdxl_pipeline))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        sample(pipe, None, prompt_embeds=given, guidance_scale=1)
    attach(pipe, make_subject())
    assert sample(pipe, None, prompt_embeds=given, guidance_scale=1).isfinite().all()
    for wrong in (foreign, given[..., :-1], given[..., :96]):
        with pytest.raises(ValueError, match=r"takes \[B, M, 48\], or packed"):
            sample(pipe, None, prompt_embeds=wrong, guidance_scale=1)
        with pytest.raises(ValueError, match=r"takes \[B, M, 48\], or packed"):
            sample(pipe, "a <it>", negative_prompt_embeds=wrong)
    long = plain(pipe, "a cat")["prompt_embeds"].repeat(1, 2, 1)
    for wrong in (torch.cat([given, given], 1), long):
        with pytest.raises(PromptError, match="negative prompt 154 tokens"):
            sample(pipe, "a <it>", negative_prompt_embeds=wrong)


def test_two_packed_chunks_are_one_long_prompt(pipe, make_subject):
    long = torch.cat([plain(pipe, text)["prompt_embeds"] for text in ("a cat", "snow")], 1)
    expected = sample(pipe, None, prompt_embeds=long, guidance_scale=1)
    attach(pipe, make_subject(distance=0))
    chunks = torch.cat([encode(pipe, text) for text in ("a <it>", "snow")], 1)
    assert_close(sample(pipe, None, prompt_embeds=chunks, guidance_scale=1), expected)


@both_families
@pytest.mark.parametrize("names", [PARTS, PARTS[:2], PARTS[:1], PARTS[1:2]], ids="-".join)
def test_packed_prompts_need_no_text_encoders(pipe, make_subject, names):
    attach(pipe, make_subject())
    cases = [packed(pipe, "a <it> in the snow", "a <it>, a car"), packed(pipe, "a cat", "")]
    expected = [sample(pipe, None, **given) for given in cases]
    assert_close(expected[1], sample(pipe, "a cat", negative_prompt=""))
    freed = [weakref.ref(getattr(pipe, n)) for n in names if "enc" in n and hasattr(pipe, n)]
    free(pipe, *names)
    gc.collect()
    assert not any(reference() for reference in freed)
    for given, want in zip(cases, expected, strict=True):
        assert_close(sample(pipe, None, **given), want, 1e-5)
    alone = {name: value for name, value in given.items() if not name.startswith("negative")}
    # Without guidance, or where the model wants zeros, no negative prompt is encoded.
    guidance = 5 if hasattr(pipe, "text_encoder_2") else 1
    assert sample(pipe, None, guidance_scale=guidance, **alone).isfinite().all()


@both_families
def test_prompts_in_words_need_the_text_encoders(pipe, family, make_subject):
    attach(pipe, make_subject())
    given = packed(pipe, "a <it>")
    free(pipe, *PARTS)
    with pytest.raises(ModelError, match="text_encoder.* gone, and the prompt is still to be enc"):
        sample(pipe, "a <it>")
    words = r"the negative prompt is still .* as negative_prompt_embeds, .* made by sefi_fast\.\w"
    for negative in ("a car", None if family == "sd15" else ""):
        with pytest.raises(ModelError, match=words):
            sample(pipe, None, **given, negative_prompt=negative)
    for context in (trace(pipe, "<it>"), regions(pipe, {"a <it>": (0, 0, 1, 1)})):
        with pytest.raises(ModelError, match="needed to encode prompts"), context:
            raise AssertionError
    with pytest.raises(ModelError, match="needed to encode prompts"):
        encode(pipe, "a <it>")


@both_families
def test_text_encoders_that_come_back_encode_again(pipe, make_subject):
    sample(pipe, "a cat", num_inference_steps=1)  # A call leaves its settings on the pipeline.
    before = set(vars(pipe))
    attach(pipe, make_subject())
    kept = {name: getattr(pipe, name) for name in PARTS if hasattr(pipe, name)}
    expected = sample(pipe, "a <it>")
    given = packed(pipe, "a <it>", "")
    free(pipe, *PARTS)
    of_tensors = sample(pipe, None, **given)
    assert not any(part._forward_pre_hooks for name, part in kept.items() if "enc" in name)
    copied, detached = copy.deepcopy(pipe), detach(copy.deepcopy(pipe))
    assert_close(sample(copied, None, **given), of_tensors, 1e-5)
    assert set(vars(detached)) == before
    for name, part in kept.items():
        setattr(pipe, name, part)
    assert_close(sample(pipe, "a <it>"), expected, 1e-5)
