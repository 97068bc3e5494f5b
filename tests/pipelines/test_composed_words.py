"""A placeholder is found in both Unicode forms of a prompt, wherever a prompt enters."""

from __future__ import annotations

import dataclasses
import unicodedata

import pytest
import torch
from pipelines.sampling import draw

import sefi_fast
from sefi_fast.errors import PromptError
from sefi_fast.subject import Subject
from sefi_fast.subject.subject import _content
from sefi_fast.utils.files import atomic_write

NAME = "<café>"
APART = unicodedata.normalize("NFD", NAME)
BOX = (0, 0, 1, 1)


@pytest.fixture
def attached(sd15_pipeline, make_subject):
    return sefi_fast.attach(sd15_pipeline, make_subject(placeholder=APART))


def _encoded(pipe, name):
    return sefi_fast.encode(pipe, f"a {name}")


def _drawn(pipe, name):
    return draw(pipe, f"a {name}")


def _traced(pipe, name):
    with sefi_fast.trace(pipe, [name]) as found:
        draw(pipe, f"a {APART} person")
    (kept,) = found.maps.values()
    assert found._pick([name], 0)[0].equal(kept[0])
    return kept


def _in_regions(pipe, name):
    with sefi_fast.regions(pipe, {f"a {name}": BOX}):
        return draw(pipe, "a dog")


def _swapped(pipe, name):
    words = {"key_prompt": f"a {name}", "value_prompt": f"a {name}"}
    return sefi_fast.swap(pipe, **words, steps=1, output_type="latent")[0]


@pytest.mark.parametrize("use", [_encoded, _drawn, _traced, _in_regions, _swapped])
def test_both_forms_of_a_placeholder_are_one(attached, use):
    assert torch.equal(use(attached, NAME), use(attached, APART))
    assert not torch.equal(use(attached, NAME), use(attached, "person"))


def test_a_subject_file_with_the_other_form_is_read(make_subject, tmp_path):
    subject = make_subject(placeholder=NAME)
    assert subject.placeholder == NAME
    vars(subject).update(placeholder=APART, class_word=APART)
    atomic_write(tmp_path / "me.safetensors", _content(subject))
    read = Subject.load(tmp_path / "me.safetensors")
    assert (read.placeholder, read.class_word) == (NAME, "<café>")


def test_two_subjects_of_one_word_are_told(sd15_pipeline, make_subject):
    with pytest.raises(ValueError, match="have the placeholder '<café>'"):
        sefi_fast.attach(sd15_pipeline, [make_subject(placeholder=x) for x in (NAME, APART)])


def test_a_subject_renamed_to_what_is_not_one_word_is_told(make_subject):
    subject = make_subject()
    with pytest.raises(PromptError, match="one word"):
        subject.placeholder = "two words"
    subject.placeholder = APART
    assert subject.placeholder == NAME


def test_a_model_folder_with_broken_text_in_its_name_can_be_kept(make_subject, tmp_path):
    subject = dataclasses.replace(make_subject(), base_model="models/\udcff")
    subject.save(tmp_path / "me.safetensors")
    assert Subject.load(tmp_path / "me.safetensors").base_model == "models/\\udcff"


def test_a_prompt_in_any_language_is_quoted_in_its_letters(attached):
    with pytest.raises(PromptError, match="фото < café > в лесу"):
        draw(attached, "фото <CAFÉ> в лесу")
