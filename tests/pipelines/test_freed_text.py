"""Packed prompts are drawn after the text encoders that made them were freed."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from pipelines.sampling import draw, subject_for

from sefi_fast import attach, detach, regions, trace
from sefi_fast.errors import ModelError
from sefi_fast.prompts import encode, encode_with_pooled

EXACT = {"rtol": 0, "atol": 1e-5}
PIPELINES = ["sd15_pipeline", "sdxl_pipeline"]
ALL = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.fixture(params=PIPELINES)
def pipe(request):
    pipe = request.getfixturevalue(request.param)
    return attach(pipe, subject_for(pipe))


def packed(pipe, prompt: str, negative: str | None = None) -> dict[str, torch.Tensor]:
    """What the call takes in place of a prompt, and of a negative one if it is not None."""
    given = encode_with_pooled(pipe, prompt)._asdict()
    if negative is not None:
        other = encode_with_pooled(pipe, negative)._asdict()
        given |= {f"negative_{name}": value for name, value in other.items()}
    return {name: value for name, value in given.items() if value is not None}


def free(pipe, *names: str) -> None:
    for name in names:
        if hasattr(pipe, name):
            setattr(pipe, name, None)


@pytest.mark.parametrize("names", [ALL, ALL[:2], ALL[:1], ALL[1:2]], ids="-".join)
def test_what_was_encoded_before_is_drawn(pipe, names):
    given = packed(pipe, "a <it> in the snow", "a <it>, a car")
    expected = draw(pipe, None, **given)
    free(pipe, *names)
    torch.testing.assert_close(draw(pipe, None, **given), expected, **EXACT)
    alone = {name: value for name, value in given.items() if not name.startswith("negative")}
    assert draw(pipe, None, guidance_scale=1.0, **alone).isfinite().all()


def test_prompts_without_a_subject_too(pipe):
    given = packed(pipe, "a cat", "")
    expected = draw(pipe, "a cat", negative_prompt="")
    free(pipe, *ALL)
    torch.testing.assert_close(draw(pipe, None, **given), expected, rtol=0, atol=2e-4)


def test_what_is_still_to_be_encoded_is_told(pipe):
    given = packed(pipe, "a <it>")
    free(pipe, *ALL)
    with pytest.raises(ModelError, match="text_encoder.* gone, and the prompt is still to be enc"):
        draw(pipe, "a <it>")
    told = r"the negative prompt is still .* as negative_prompt_embeds, .* made by sefi_fast\.\w"
    for negative in ("a car", "" if "pooled_prompt_embeds" in given else None):
        with pytest.raises(ModelError, match=told):
            draw(pipe, None, **given, negative_prompt=negative)
    for what in (trace(pipe, "<it>"), regions(pipe, {"a <it>": (0, 0, 1, 1)})):
        with pytest.raises(ModelError, match="needed to encode prompts"), what:
            raise AssertionError
    with pytest.raises(ModelError, match="needed to encode prompts"):
        encode(pipe, "a <it>")


def test_a_model_that_wants_zeros_needs_no_negative_prompt(sdxl_pipeline):
    pipe = attach(sdxl_pipeline, subject_for(sdxl_pipeline))
    given = packed(pipe, "a <it>")
    expected = draw(pipe, None, **given)
    free(pipe, *ALL)
    torch.testing.assert_close(draw(pipe, None, **given), expected, **EXACT)


def test_the_memory_is_free_at_once(pipe):
    freed = [weakref.ref(getattr(pipe, name)) for name in ALL[:2] if hasattr(pipe, name)]
    given = packed(pipe, "a <it>", "")
    free(pipe, *ALL[:2])
    gc.collect()
    assert [one() for one in freed] == [None] * len(freed)
    assert draw(pipe, None, **given).isfinite().all()


def test_text_encoders_that_come_back_encode_again(pipe):
    kept = {name: getattr(pipe, name) for name in ALL if hasattr(pipe, name)}
    expected = draw(pipe, "a <it>")
    given = packed(pipe, "a <it>", "")
    free(pipe, *ALL)
    draw(pipe, None, num_inference_steps=1, **given)
    assert not any(kept[name]._forward_pre_hooks for name in ALL[:2] if name in kept)
    for name, part in kept.items():
        setattr(pipe, name, part)
    torch.testing.assert_close(draw(pipe, "a <it>"), expected, **EXACT)


def test_copies_and_detaching(pipe):
    given = packed(pipe, "a <it>", "")
    free(pipe, *ALL)
    expected = draw(pipe, None, **given)
    copied = copy.deepcopy(pipe)
    detach(pipe)
    assert not {"encode_prompt", "_get_add_time_ids"} & vars(pipe).keys()
    torch.testing.assert_close(draw(copied, None, **given), expected, **EXACT)
