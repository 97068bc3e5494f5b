"""swap: keys of one prompt with values of another, against a sampling loop written by hand."""

from __future__ import annotations

import pytest
import torch
from pipelines.sampling import draw, sample_by_hand, state_of

from sefi_fast import attach, detach, encode, swap
from sefi_fast.errors import PromptError
from sefi_fast.prompts import encode_with_pooled, pack, unpack

SHORT = {"steps": 4, "guidance": 5.0, "output_type": "latent"}


def swapped(pipe, keys: str, values: str, **arguments) -> torch.Tensor:
    found = swap(pipe, key_prompt=keys, value_prompt=values, **{**SHORT, **arguments})
    return torch.stack([torch.as_tensor(latents) for latents in found])


def test_keys_and_values_come_from_their_prompts(sd15_pipeline):
    plain = draw(sd15_pipeline, "a cat")
    mixed = swapped(sd15_pipeline, "a cat", "a dog")
    by_hand = sample_by_hand(sd15_pipeline, "a cat", [], value_prompt="a dog")
    torch.testing.assert_close(mixed, by_hand, rtol=1e-4, atol=1e-4)
    other_way = swapped(sd15_pipeline, "a dog", "a cat")
    for different in (plain, other_way):
        assert (mixed - different).abs().max() > 1e-2


def test_equal_prompts_give_the_plain_picture(sd15_pipeline):
    torch.testing.assert_close(
        swapped(sd15_pipeline, "a cat", "a cat"), draw(sd15_pipeline, "a cat"), rtol=1e-4, atol=1e-4
    )


def test_subjects_may_stand_in_either_prompt(sd15_pipeline, make_subject):
    subject = make_subject(stages=3)
    attach(sd15_pipeline, subject)
    mixed = swapped(sd15_pipeline, "a dog", "a <it>")
    detach(sd15_pipeline)
    by_hand = sample_by_hand(sd15_pipeline, "a dog", [subject], value_prompt="a <it>")
    torch.testing.assert_close(mixed, by_hand, rtol=1e-4, atol=1e-4)


def test_several_pictures_and_a_negative_prompt(sd15_pipeline):
    both = swapped(sd15_pipeline, "a cat", "a dog", n=2, seed=3, negative_prompt="a car")
    one = swapped(sd15_pipeline, "a cat", "a dog", seed=4, negative_prompt="a car")
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)
    by_hand = sample_by_hand(
        sd15_pipeline, "a cat", [], value_prompt="a dog", negative="a car", seed=4
    )
    torch.testing.assert_close(one, by_hand, rtol=1e-4, atol=1e-4)


def test_clip_skip_holds_for_both_prompts(sd15_pipeline, make_subject):
    attach(sd15_pipeline, make_subject())  # Packed embeddings want it.
    skipped = swapped(sd15_pipeline, "a cat", "a cat", clip_skip=1)
    plain = draw(sd15_pipeline, None, prompt_embeds=encode(sd15_pipeline, "a cat", clip_skip=1))
    torch.testing.assert_close(skipped, plain, rtol=1e-4, atol=1e-4)
    assert (skipped - draw(sd15_pipeline, "a cat")).abs().max() > 1e-2


def test_embeddings_of_several_vectors_are_written_out(sd15_pipeline):
    vectors = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    sd15_pipeline.load_textual_inversion({"<style>": vectors}, token="<style>")
    text = "a cat in <style>"
    torch.testing.assert_close(
        swapped(sd15_pipeline, text, text), draw(sd15_pipeline, text), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("fail", [False, True])
def test_the_pipeline_is_as_before(sd15_pipeline, fail):
    draw(sd15_pipeline, "a cat", num_inference_steps=1)  # A call leaves its settings behind.
    before = state_of(sd15_pipeline)
    if fail:
        with pytest.raises(ValueError, match="steps of at least 1"):
            swapped(sd15_pipeline, "a cat", "a dog", steps=0)
    else:
        swapped(sd15_pipeline, "a cat", "a dog", steps=1)
    assert state_of(sd15_pipeline) == before


def test_a_prompt_must_be_one_sentence_with_known_words(sd15_pipeline, make_subject):
    with pytest.raises(TypeError, match="value_prompt must be one sentence"):
        swap(sd15_pipeline, key_prompt="a cat", value_prompt=["a dog"])
    attach(sd15_pipeline, make_subject())
    with pytest.raises(PromptError):
        swapped(sd15_pipeline, "a cat", "a<it>b")


def test_sdxl_takes_the_pooled_embedding_of_the_values(sdxl_pipeline, make_sdxl_subject):
    pipe = attach(sdxl_pipeline, [make_sdxl_subject(stages=3)])
    torch.testing.assert_close(
        swapped(pipe, "a <it>", "a <it>"), draw(pipe, "a <it>"), rtol=1e-3, atol=1e-3
    )
    mixed = swapped(pipe, "a dog", "a <it>")
    packed, pooled = encode_with_pooled(pipe, "a <it>")
    keys = unpack(encode_with_pooled(pipe, "a dog").prompt_embeds, 112)[:, :, 0]
    streams = unpack(packed, 112).clone()
    streams[:, :, 0] = keys
    expected = draw(pipe, None, prompt_embeds=pack(streams), pooled_prompt_embeds=pooled)
    torch.testing.assert_close(mixed, expected, rtol=1e-3, atol=1e-3)
    assert (mixed - draw(pipe, "a <it>")).abs().max() > 1e-2
