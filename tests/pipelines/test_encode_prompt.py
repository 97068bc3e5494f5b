"""Results of an attached encode_prompt for every way of giving prompts and negative prompts."""

from __future__ import annotations

import inspect

import pytest
import torch
from pipelines.sampling import assert_close, assert_differ, both_families, encode_prompt

from sefi_fast import attach, encode
from sefi_fast.errors import PromptError
from sefi_fast.prompts import pack, packed_stages, unpack


def plain(pipe, *texts) -> torch.Tensor:
    """[P, 77, C] straight from tokenizer and text encoder."""
    ids = pipe.tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        return pipe.text_encoder(ids.input_ids)[0]


def in_every_stage(prompt, stages) -> torch.Tensor:
    """The packed form of a plain prompt."""
    return pack(prompt[:, None, None].expand(-1, stages, 2, -1, -1))


def stages_of(packed) -> int:
    return packed_stages(packed.shape[2], 48)


@pytest.fixture
def subjects(make_subject):
    return [make_subject(), make_subject("<me>", "person", stages=10)]


@pytest.fixture
def attached(pipe, subjects):
    return attach(pipe, subjects)


@both_families
def test_it_is_called_and_answers_as_the_pipelines_own(pipe, subjects):
    own = inspect.signature(pipe.encode_prompt)
    arguments = {"prompt": ["a dog", "a car"], "images": 2, "negative_prompt": ["a hat", ""]}
    expected = encode_prompt(pipe, **arguments)
    attach(pipe, subjects)
    assert str(inspect.signature(pipe.encode_prompt)) == str(own)
    actual = encode_prompt(pipe, **arguments)
    assert all(map(torch.equal, actual, expected)) and len(actual) == len(expected)
    width, stages = expected[0].shape[2], 5
    packed = encode_prompt(pipe, **arguments | {"prompt": ["a <it>", "a car"]})
    assert_close(packed[0][2:], in_every_stage(expected[0][2:], stages), 1e-4)
    assert_close(packed[1], in_every_stage(expected[1], stages), 1e-4)
    assert packed[0].shape == packed[1].shape == (4, 77, stages * (2 * width + 1))
    if len(expected) == 4:
        assert packed[2].shape == (4, 5 * 32)
        assert_close(packed[3], expected[3].repeat(1, 5), 1e-4)
    only = encode_prompt(pipe, "a <it>", guidance=False)
    assert only[0].shape == (1, *packed[0].shape[1:]) and only[1] is None


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    ("positive", "negative", "stages"),
    [
        (["a <it>", "a <me>"], None, 10),
        (["a <it>", "a <me>"], ["a car", "a dog"], 10),
        (["a <it>"], ["a <me>"], 10),
        (["a dog"], ["a <it>"], 5),
        (("packed", "a <me>"), None, 10),
        (("packed", "a <me>"), ["a <it>"], 10),
        (("packed", "a <it>"), ["a <me>"], 10),
        (["a <it>"], ("plain", "a car"), 5),
        (["a <it>"], ("packed", "a <me>"), 10),
    ],
)
def test_prompt_and_negative_prompt_get_the_same_stages(
    attached, subjects, positive, negative, stages, images
):
    def packed(text):
        named = [subject for subject in subjects if subject.placeholder in text]
        if named:
            return encode(attached, text, subjects=named)
        return in_every_stage(plain(attached, text), 1)

    def in_stages(text):
        streams = unpack(packed(text), 48)
        return pack(streams.repeat_interleave(stages // streams.shape[1], 1))

    arguments, expected = {"prompt": None}, []
    for name, given in (("prompt", positive), ("negative_prompt", negative)):
        texts = given or [""] * len(expected[0])
        if isinstance(given, tuple):
            form, *texts = given
            embeds = packed(*texts) if form == "packed" else plain(attached, *texts)
            arguments[f"{name}_embeds"] = embeds
        else:
            arguments[name] = given
        expected.append(torch.cat([in_stages(text) for text in texts]))
    actual = encode_prompt(attached, images=images, **arguments)
    for one, want in zip(actual, expected, strict=True):
        assert_close(one, want.repeat_interleave(images, 0), 1e-5)


def test_a_negative_prompt_counts_only_with_guidance(attached):
    positive, negative = encode_prompt(attached, "a dog", guidance=False, negative_prompt="a <it>")
    assert positive.shape[2] == 48 and negative is None


def test_clip_skip_is_for_the_prompt_alone(attached):
    positive, negative = encode_prompt(attached, "a <it>", negative_prompt="a <me>", clip_skip=1)
    assert_close(positive, encode(attached, "a <it>", clip_skip=1), 1e-5)
    assert_close(negative, encode(attached, "a <me>"), 1e-5)
    assert_differ(positive, encode(attached, "a <it>"))


@both_families
def test_a_lora_scale_reaches_the_text_encoders(pipe, make_subject):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    for name in ("text_encoder", "text_encoder_2")[: 1 + hasattr(pipe, "text_encoder_2")]:
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, getattr(pipe, name))
    scales = (None, 0.2, None)
    expected = [encode_prompt(pipe, "a cat", guidance=False, lora_scale=x)[0] for x in scales]
    assert_differ(expected[0], expected[1])
    attach(pipe, make_subject(distance=0))
    for scale, want in zip(scales, expected, strict=True):
        actual = encode_prompt(pipe, "a <it>", guidance=False, lora_scale=scale)[0]
        assert_close(actual, in_every_stage(want, 5), 1e-4)


def test_textual_inversion_words_next_to_subjects(pipe, make_subject):
    vectors = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<style>": vectors}, token="<style>")
    expected, _ = encode_prompt(pipe, "a cat in <style>", guidance=False)
    attach(pipe, make_subject(distance=0))
    actual, _ = encode_prompt(pipe, "a <it> in <style>", guidance=False)
    assert_close(actual, in_every_stage(expected, 5), 1e-5)
    assert_close(encode(pipe, "a <it> in <style>"), actual, 1e-5)


def test_only_subjects_in_the_prompt_count_for_its_stages(pipe, make_subject):
    names = {"<seven>": 7, "<eight>": 8, "<nine>": 9}
    attach(pipe, [make_subject(name, stages=n) for name, n in names.items()])
    for name, stages in names.items():
        assert stages_of(encode_prompt(pipe, f"a {name}")[0]) == stages
    with pytest.raises(ValueError, match="504 stages together"):
        encode_prompt(pipe, "a <seven>, a <eight> and a <nine>")


@pytest.mark.parametrize(
    ("prompt", "negative", "error", "words"),
    [
        ("a <it>", ["a car"], TypeError, "type of prompt, str, but it is list"),
        (["a <it>", "a dog"], ["a car"], ValueError, "1 negative prompts for 2 prompts"),
        ("a <it>", 2, ValueError, "is for 2 prompts, but there are 1"),
        ("a <it>ty", None, PromptError, "longer word"),
    ],
)
def test_prompts_that_do_not_fit_together_are_refused(attached, prompt, negative, error, words):
    arguments = {"negative_prompt": negative}
    if negative == 2:
        arguments = {"negative_prompt_embeds": plain(attached, "a car", "a dog")}
    with pytest.raises(error, match=words):
        encode_prompt(attached, prompt, **arguments)
