"""What encode_prompt gives back for every way of giving prompts and negative prompts."""

from __future__ import annotations

import inspect

import pytest
import torch
from pipelines.sampling import draw

from sefi_fast.errors import PromptError
from sefi_fast.pipelines import attach
from sefi_fast.prompts import encode, pack, packed_stages, unpack

CPU = torch.device("cpu")
EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def attached(sd15_pipeline, make_subject):
    return attach(sd15_pipeline, [make_subject(), make_subject("<me>", "person", stages=10)])


def plain(pipe, *texts) -> torch.Tensor:
    """[P, 77, C] straight from tokenizer and text encoder."""
    ids = pipe.tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        return pipe.text_encoder(ids.input_ids)[0]


def every_stage(prompt, stages) -> torch.Tensor:
    return pack(prompt[:, None, None].expand(-1, stages, 2, -1, -1))


def run(pipe, prompt, *, images=1, guidance=True, **arguments):
    with torch.no_grad():
        return pipe.encode_prompt(prompt, CPU, images, guidance, **arguments)


def test_it_is_called_as_the_pipelines_own(sd15_pipeline, make_subject):
    own = inspect.signature(sd15_pipeline.encode_prompt)
    attach(sd15_pipeline, make_subject())
    ours = inspect.signature(sd15_pipeline.encode_prompt)
    assert list(ours.parameters) == list(own.parameters)
    defaults = [p.default for p in ours.parameters.values()]
    assert defaults == [p.default for p in own.parameters.values()]


def test_plain_prompts_stay_plain(attached):
    positive, negative = run(attached, ["a dog", "a car"], images=2)
    dog, car, empty = plain(attached, "a dog", "a car", "")
    torch.testing.assert_close(positive, torch.stack([dog, dog, car, car]), **EXACT)
    torch.testing.assert_close(negative, empty.expand(4, -1, -1), **EXACT)
    positive, negative = run(attached, "a dog", guidance=False, negative_prompt="a <it>")
    assert positive.shape[1] == 77 and negative is None


@pytest.mark.parametrize("images", [1, 2])
def test_negative_prompts_are_packed_to_match(attached, images):
    want = encode(attached, ["a <it>", "a <me>"]).repeat_interleave(images, 0)
    stages = packed_stages(want.shape[2], 48)
    positive, negative = run(attached, ["a <it>", "a <me>"], images=images)
    torch.testing.assert_close(positive, want, **EXACT)
    empty = every_stage(plain(attached, "", ""), stages)
    torch.testing.assert_close(negative, empty.repeat_interleave(images, 0), **EXACT)
    positive, negative = run(
        attached, ["a <it>", "a <me>"], images=images, negative_prompt=["a car", "a dog"]
    )
    texts = every_stage(plain(attached, "a car", "a dog"), stages)
    torch.testing.assert_close(negative, texts.repeat_interleave(images, 0), **EXACT)


def test_a_placeholder_in_the_negative_prompt_packs_the_prompt(attached):
    positive, negative = run(attached, "a dog", negative_prompt="a <it>")
    five, _ = attached.encode_prompt.subjects
    torch.testing.assert_close(negative, encode(attached, "a <it>", subjects=five), **EXACT)
    stages = packed_stages(negative.shape[2], 48)
    torch.testing.assert_close(positive, every_stage(plain(attached, "a dog"), stages), **EXACT)


def test_packed_prompts_given_as_tensors(attached):
    packed = encode(attached, "a <me>")
    stages = packed_stages(packed.shape[2], 48)
    positive, negative = run(attached, None, prompt_embeds=packed)
    torch.testing.assert_close(positive, packed, **EXACT)
    torch.testing.assert_close(negative, every_stage(plain(attached, ""), stages), **EXACT)
    pair = packed.expand(2, -1, -1)
    _, negative = run(attached, None, prompt_embeds=pair, negative_prompt="a <it>", images=2)
    want = encode(attached, "a <it>").expand(4, -1, -1)
    torch.testing.assert_close(negative, want, **EXACT)
    given = plain(attached, "a car")
    positive, negative = run(attached, "a <it>", negative_prompt_embeds=given)
    torch.testing.assert_close(negative, every_stage(given, 5), **EXACT)
    with pytest.raises(PromptError, match="154 tokens"):
        run(attached, "a <it>", negative_prompt_embeds=given.repeat(1, 2, 1))


def test_tensors_of_different_stages_meet_in_a_common_number(attached):
    five, ten = attached.encode_prompt.subjects
    packed = encode(attached, "a <it>", subjects=five)
    assert packed_stages(packed.shape[2], 48) == 5
    positive, negative = run(attached, None, prompt_embeds=packed, negative_prompt="a <me>")
    assert positive.shape == negative.shape
    streams, common = unpack(packed, 48), unpack(positive, 48)
    for stage in range(10):
        assert torch.equal(common[:, stage], streams[:, stage // 2])
    torch.testing.assert_close(negative, encode(attached, "a <me>"), **EXACT)


def test_plain_tensors_pass_through(attached):
    given = plain(attached, "a car").repeat(1, 2, 1)
    positive, negative = run(attached, None, prompt_embeds=given, negative_prompt_embeds=-given)
    assert torch.equal(positive, given) and torch.equal(negative, -given)


def test_a_picture_from_tensors_is_the_picture_from_words(attached):
    expected = draw(attached, "a <it> in the snow", negative_prompt="a <me>")
    actual = draw(
        attached,
        None,
        prompt_embeds=encode(attached, "a <it> in the snow"),
        negative_prompt_embeds=encode(attached, "a <me>"),
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_tensors_work_on_a_pipeline_attached_to_other_subjects(attached, make_subject):
    subject = make_subject("<other>", "dog", stages=3)
    packed = encode(attached, "a <other>", subjects=[subject])
    actual = draw(attached, None, prompt_embeds=packed)
    attach(attached, subject)
    torch.testing.assert_close(actual, draw(attached, "a <other>"), rtol=0, atol=1e-4)


def test_clip_skip_is_for_the_prompt_alone(attached):
    positive, negative = run(attached, "a <it>", negative_prompt="a <me>", clip_skip=1)
    torch.testing.assert_close(positive, encode(attached, "a <it>", clip_skip=1), **EXACT)
    torch.testing.assert_close(negative, encode(attached, "a <me>"), **EXACT)
    assert (positive - encode(attached, "a <it>")).abs().max() > 1e-2


def test_a_lora_scale_reaches_the_text_encoder(attached, monkeypatch):
    from sefi_fast.pipelines import encode_prompt

    scales = []
    monkeypatch.setattr(encode_prompt, "USE_PEFT_BACKEND", True)
    monkeypatch.setattr(
        encode_prompt, "scale_lora_layers", lambda model, scale: scales.append(("on", scale))
    )
    monkeypatch.setattr(
        encode_prompt, "unscale_lora_layers", lambda model, scale: scales.append(("off", scale))
    )
    run(attached, "a <it>", lora_scale=0.5, guidance=False)
    assert scales == [("on", 0.5), ("off", 0.5)]
    assert attached._lora_scale == 0.5


def test_textual_inversion_words_stand_beside_subjects(sd15_pipeline, make_subject):
    pipe = sd15_pipeline
    vectors = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<style>": vectors}, token="<style>")
    expected, _ = run(pipe, "a cat in <style>", guidance=False)
    attach(pipe, make_subject(distance=0))
    actual, _ = run(pipe, "a <it> in <style>", guidance=False)
    streams = unpack(actual, 48)
    torch.testing.assert_close(streams, expected[:, None, None].expand_as(streams), **EXACT)
    torch.testing.assert_close(encode(pipe, "a <it> in <style>"), actual, **EXACT)


def test_subjects_that_are_not_in_the_prompt_do_not_count(sd15_pipeline, make_subject):
    names = {"<seven>": 7, "<eight>": 8, "<nine>": 9}
    attach(sd15_pipeline, [make_subject(name, stages=n) for name, n in names.items()])
    for name, stages in names.items():
        positive, _ = run(sd15_pipeline, f"a {name}")
        assert packed_stages(positive.shape[2], 48) == stages
    with pytest.raises(ValueError, match="504 stages together"):
        run(sd15_pipeline, "a <seven>, a <eight> and a <nine>")


def test_wrong_pairs_of_prompts_are_told_in_words(attached):
    with pytest.raises(TypeError, match="type of prompt, str, but it is list"):
        run(attached, "a <it>", negative_prompt=["a car"])
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        run(attached, ["a <it>", "a dog"], negative_prompt=["a car"])
    with pytest.raises(ValueError, match="is for 2 prompts, but there are 1"):
        run(attached, "a <it>", negative_prompt_embeds=plain(attached, "a car", "a dog"))
    with pytest.raises(PromptError, match="longer word"):
        run(attached, "a <it>ty")
