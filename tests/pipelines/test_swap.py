"""swap: keys of one prompt with values of another, against a sampling loop written by hand."""

from __future__ import annotations

import pytest
import torch
from pipelines.sampling import (
    assert_close,
    assert_differ,
    both_families,
    sample,
    sample_by_hand,
    state_of,
)

from sefi_fast import attach, detach, encode, swap
from sefi_fast.errors import PromptError


def swapped(pipe, keys: str, values: str, **arguments) -> torch.Tensor:
    arguments = {"steps": 4, "guidance": 5.0, "output_type": "latent"} | arguments
    found = swap(pipe, key_prompt=keys, value_prompt=values, **arguments)
    return torch.stack([torch.as_tensor(latents) for latents in found])


@both_families
@pytest.mark.parametrize("values", ["a dog", "a <it>"])
def test_keys_and_values_come_from_their_prompts(pipe, make_subject, values):
    subject = make_subject(stages=3)
    attach(pipe, subject)
    mixed, other_way = swapped(pipe, "a bear", values), swapped(pipe, values, "a bear")
    assert_differ(mixed, other_way)
    assert_differ(mixed, sample(pipe, "a bear"))
    assert_close(swapped(pipe, values, values), sample(pipe, values))
    detach(pipe)
    subjects = [subject] if "<it>" in values else []
    assert_close(mixed, sample_by_hand(pipe, "a bear", subjects, value_prompt=values))


def test_a_bare_pipeline_takes_several_images_and_a_negative_prompt(pipe):
    both = swapped(pipe, "a cat", "a dog", n=2, seed=3, negative_prompt="a car")
    one = swapped(pipe, "a cat", "a dog", seed=4, negative_prompt="a car")
    assert_close(both[1:], one)
    expected = sample_by_hand(pipe, "a cat", [], value_prompt="a dog", negative="a car", seed=4)
    assert_close(one, expected)


def test_clip_skip_holds_for_both_prompts(pipe, make_subject):
    attach(pipe, make_subject())  # Packed embeddings need it.
    skipped = swapped(pipe, "a cat", "a cat", clip_skip=1)
    plain = sample(pipe, None, prompt_embeds=encode(pipe, "a cat", clip_skip=1))
    assert_close(skipped, plain)
    assert_differ(skipped, sample(pipe, "a cat"))


def test_textual_inversion_words_of_several_vectors(pipe):
    vectors = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<style>": vectors}, token="<style>")
    text = "a cat in <style>"
    assert_close(swapped(pipe, text, text), sample(pipe, text))


def test_the_pipeline_is_restored(pipe):
    sample(pipe, "a cat", num_inference_steps=1)  # A call leaves its settings on the pipeline.
    before = state_of(pipe)
    swapped(pipe, "a cat", "a dog", steps=1)
    assert state_of(pipe) == before
    with pytest.raises(ValueError, match="steps of at least 1"):
        swapped(pipe, "a cat", "a dog", steps=0)
    assert state_of(pipe) == before


def test_a_prompt_must_be_one_sentence_with_known_words(pipe, make_subject):
    with pytest.raises(TypeError, match="value_prompt must be one sentence"):
        swap(pipe, key_prompt="a cat", value_prompt=["a dog"])
    attach(pipe, make_subject())
    with pytest.raises(PromptError):
        swapped(pipe, "a cat", "a<it>b")
