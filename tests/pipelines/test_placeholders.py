"""Placeholders in any form of writing, and warnings and errors for those without a subject."""

from __future__ import annotations

import copy
import dataclasses
import logging
import unicodedata

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionControlNetPipeline
from models import make_controlnet
from pipelines.sampling import HINT, assert_close, both_families, sample, state_of, twin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sefi_fast import attach, detach, encode, regions, swap, trace
from sefi_fast.errors import PromptError
from sefi_fast.subject import Subject

MISSING = "as plain words, so that its subject would be missing"
QUICK = {"num_inference_steps": 1}
NAME = "<café>"
DECOMPOSED = unicodedata.normalize("NFD", NAME)


@pytest.fixture
def attached(pipe, make_subject):
    return attach(pipe, make_subject())


def traced(pipe, name):
    with trace(pipe, [name]) as found:
        image = pipe(f"a {DECOMPOSED} person", **QUICK, generator=torch.Generator()).images[0]
    (kept,) = found.maps.values()
    assert found.overlay(image, name).size == image.size
    return kept


def in_regions(pipe, name):
    with regions(pipe, {f"a {name}": (0, 0, 1, 1)}):
        return sample(pipe, "a dog")


def swapped(pipe, name):
    words = {"key_prompt": f"a {name}", "value_prompt": f"a {name}"}
    return swap(pipe, **words, steps=1, output_type="latent")[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda pipe, name: encode(pipe, f"a {name}"),
        lambda pipe, name: sample(pipe, f"a {name}"),
        traced,
        in_regions,
        swapped,
    ],
    ids=["encode", "sample", "trace", "regions", "swap"],
)
def test_both_unicode_forms_of_a_placeholder_are_one(pipe, make_subject, use):
    attach(pipe, make_subject(placeholder=DECOMPOSED))
    assert torch.equal(use(pipe, NAME), use(pipe, DECOMPOSED))
    assert not torch.equal(use(pipe, NAME), use(pipe, "person"))


def test_subjects_keep_the_composed_form(pipe, make_subject, tmp_path):
    subject, path = make_subject(placeholder=NAME), tmp_path / "me.safetensors"
    subject.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {"placeholder": DECOMPOSED, "class_word": DECOMPOSED}
    save_file(load_file(path), path, metadata)
    read = Subject.load(path)
    assert (read.placeholder, read.class_word) == (NAME, NAME)
    with pytest.raises(ValueError, match=f"have the placeholder '{NAME}'"):
        attach(pipe, [read, make_subject(placeholder=DECOMPOSED)])
    with pytest.raises(PromptError, match="one word"):
        read.placeholder = "two words"
    read.placeholder = DECOMPOSED
    assert read.placeholder == NAME


def test_broken_text_in_the_name_of_a_model_can_be_kept(make_subject, tmp_path):
    subject = dataclasses.replace(make_subject(), base_model="models/\udcff")
    subject.save(tmp_path / "me.safetensors")
    assert Subject.load(tmp_path / "me.safetensors").base_model == "models/\\udcff"


@pytest.mark.parametrize(
    "prompt", ["a <it>", "a <it>, in snow", "(<it>)", "a '<IT>'s hat", "<it>."]
)
def test_a_placeholder_in_another_pipeline_over_the_same_models_is_refused(attached, prompt):
    other = twin(attached)
    expected = sample(other, "a photo of a dog")
    for arguments in ({"prompt": prompt}, {"prompt": "a cat", "negative_prompt": prompt}):
        with pytest.raises(PromptError, match=MISSING):
            sample(other, **arguments)
    assert_close(sample(other, "a photo of a dog"), expected, 1e-5)


def test_another_way_of_writing_in_the_pipeline_itself_is_refused(pipe, attached, make_subject):
    with pytest.raises(PromptError, match="exactly as it is"):
        sample(attached, "a <IT>")
    attach(pipe, make_subject(placeholder=NAME))
    with pytest.raises(PromptError, match="фото < café > в лесу"):
        sample(pipe, "фото <CAFÉ> в лесу")


@pytest.mark.parametrize("family", ["sdxl"])
def test_a_placeholder_in_the_second_prompt_is_refused_too(attached):
    other = AutoPipelineForImage2Image.from_pipe(attached)
    with pytest.raises(PromptError, match=MISSING):
        sample(other, "a dog", prompt_2="a <it>", image=HINT)


def test_a_controlnet_that_another_pipeline_adds(attached, make_subject):
    net = make_controlnet(attached.unet, seed=1)
    added = StableDiffusionControlNetPipeline.from_pipe(attached, controlnet=net)
    built = twin(attached, StableDiffusionControlNetPipeline, controlnet=net)
    for pipe in (added, built):
        with pytest.raises(PromptError, match=r"sefi_fast\.attach"):
            sample(pipe, "a <it>", image=HINT)
    expected = sample(built, "a photo of a cat", image=HINT)
    attach(built, make_subject(distance=0))
    assert_close(sample(built, "a photo of a <it>", image=HINT), expected)


def test_a_controlnet_put_into_the_pipeline_after_attaching(pipe, make_subject):
    first, second = (make_controlnet(pipe.unet, seed=seed) for seed in (1, 2))
    kind = StableDiffusionControlNetPipeline
    pipe, other = twin(pipe, kind, controlnet=first), twin(pipe, kind, controlnet=second)
    expected = sample(other, "a photo of a cat", image=HINT)
    attach(pipe, make_subject(distance=0))
    sample(pipe, "a <it>", image=HINT)
    pipe.controlnet = second
    assert_close(sample(pipe, "a photo of a <it>", image=HINT), expected)


@torch.no_grad()
def test_a_text_encoder_called_by_other_tools(attached):
    ids = attached.tokenizer("a photo of <it> and", return_tensors="pt").input_ids
    with pytest.raises(PromptError, match=r"sefi_fast\.encode"):
        attached.text_encoder(ids)
    with pytest.raises(PromptError, match=MISSING):
        attached.text_encoder(input_ids=ids)
    assert encode(attached, "a <it>").isfinite().all()


def test_words_that_only_look_like_a_placeholder_pass(pipe, make_subject):
    attach(pipe, [make_subject("sks"), make_subject("dog", class_word="dog")])
    other = twin(pipe)
    for prompt in ("asks", "sksy", "a dog", "it <"):
        assert sample(other, prompt, **QUICK).isfinite().all()
    with pytest.raises(PromptError, match="'sks'"):
        sample(other, "a photo of sks")
    # A placeholder that is a class word stands in every encoded prompt of its subject.
    assert sample(pipe, "a dog with sks", **QUICK).isfinite().all()
    attach(pipe, [make_subject("cat", "dog"), make_subject("<it>", "red cat")])
    assert sample(pipe, "a <it>", **QUICK).isfinite().all()


def test_placeholders_are_watched_until_the_last_pipeline_is_detached(pipe, make_subject):
    other, before = twin(pipe), state_of(pipe)["text_encoder."]
    attach(pipe, make_subject())
    attach(other, make_subject("<me>", "person"))
    with pytest.raises(PromptError, match="'<me>'"):
        sample(pipe, "a <me>")
    detach(pipe)
    sample(pipe, "a <it>", **QUICK)
    with pytest.raises(PromptError, match="'<me>'"):
        sample(pipe, "a <me>")
    detach(other)
    assert state_of(pipe)["text_encoder."] == before
    sample(pipe, "a <me>", **QUICK)


def test_another_text_encoder_put_into_the_pipeline(attached):
    old, new = attached.text_encoder, copy.deepcopy(attached.text_encoder)
    attached.text_encoder = new
    sample(attached, "a <it>", **QUICK)
    assert not old._forward_pre_hooks and new._forward_pre_hooks


@pytest.fixture
def warned(caplog):
    """Return a function that returns the warnings so far."""
    caplog.set_level(logging.WARNING, logger="sefi_fast")
    return lambda: [r.getMessage() for r in caplog.records if "placeholder" in r.getMessage()]


@both_families
def test_an_unknown_placeholder_is_warned_of_once(pipe, make_subject, warned):
    attach(pipe, [make_subject(), make_subject("<me>", "person")])
    sample(pipe, "a <it> and a <me>, a <you>", **QUICK)
    (message,) = warned()
    assert "'<you>'" in message and "attached: '<it>', '<me>'" in message
    sample(pipe, ["a <you>", "a cat"], **QUICK)
    assert len(warned()) == 1
    sample(pipe, "a cat", negative_prompt="an <other>", **QUICK)
    assert "'<other>'" in warned()[1]
    sample(copy.deepcopy(pipe), "a <you>", **QUICK)
    assert len(warned()) == 3


def test_words_known_to_the_tokenizer_are_not_warned_of(pipe, make_subject, warned):
    pipe.load_textual_inversion({"<cat-toy>": torch.randn(2, 48)}, token="<cat-toy>")
    attach(pipe, [make_subject(), make_subject("<it>-2", "person")])
    for prompt in ("a <cat-toy> with <it>", "<it>-2", "a <|endoftext|>", "1 < 2 > 0 <3 <>"):
        sample(pipe, prompt, **QUICK)
    assert warned() == []


def test_unknown_placeholders_in_regions_and_next_to_other_letters(pipe, make_subject, warned):
    with regions(pipe, {"a <me>": (0, 0, 0.5, 1)}):
        sample(pipe, "a cat", **QUICK)
    (message,) = warned()
    assert "'<me>'" in message and "attached: none" in message
    attach(pipe, make_subject("<me>"))
    sample(pipe, ["<me> and <me2>, (<you>:1.2) x<you>", "<lora:snow:0.8>"], **QUICK)
    for word, message in zip(["<me2>", "<you>", "<lora:snow:0.8>"], warned()[1:], strict=True):
        assert repr(word) in message
