"""Parts of a subject fit one another, and a subject fits the models it was trained for."""

from __future__ import annotations

import pytest
import torch
from subject.making import make_subject

from sefi_fast.errors import SubjectFileError
from sefi_fast.prompts import class_token_ids
from sefi_fast.subject import Subject


def test_a_subject_does_not_change_with_further_training():
    rows = torch.zeros(5, 2, 4, requires_grad=True)
    subject = Subject("<me>", "person", [rows], [torch.zeros(4, dtype=torch.float16)], "base")
    with torch.no_grad():
        rows += 1
    assert torch.equal(subject.tokens[0], torch.zeros(5, 2, 1, 4))
    assert not subject.tokens[0].requires_grad
    assert subject.class_embeddings[0].dtype == torch.float32


SHAPE = r"\[stages, 2, vectors, C\]"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placeholder": ""}, "placeholder"),
        ({"placeholder": "my self"}, "placeholder"),
        ({"class_word": " "}, "class_word"),
        ({"tokens": []}, "each text encoder"),
        ({"widths": (4,) * 5}, "of 1 to 4"),
        ({"tokens": [torch.zeros(5, 3, 48)]}, SHAPE),
        ({"tokens": [torch.zeros(5, 48)]}, SHAPE),
        ({"tokens": [torch.zeros(5, 2, 0, 48)]}, SHAPE),
        ({"tokens": [torch.zeros(5, 2, 40)]}, "does not fit"),
        ({"widths": (8, 8), "tokens": [torch.zeros(s, 2, 8) for s in (5, 4)]}, "alike"),
        ({"stages": 101}, "at most 100 stages"),
        ({"vectors": 76}, "at most 100 stages and 75 vectors"),
        ({"class_embeddings": [torch.zeros(2, 48)]}, "does not fit"),
        ({"class_embeddings": [torch.zeros(0, 48)]}, "does not fit"),
        ({"tokens": [torch.full((5, 2, 48), float("nan"))]}, "NaN"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_subject(**fields)


def test_every_token_of_the_class_word_is_compared(sd15_pipeline):
    pipe = sd15_pipeline
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    class_ids = class_token_ids(pipe.tokenizer, "red dog")
    subject = make_subject(vectors=3, class_word="red dog", class_embeddings=[table[class_ids]])
    subject.check_fits([pipe.tokenizer], [pipe.text_encoder])
    assert subject.in_prompts(pipe.tokenizer) == ("<me>", [*class_ids, class_ids[1]])
    subject.class_embeddings[0][1] *= -1
    with pytest.raises(SubjectFileError, match="cosine similarity"):
        subject.check_fits([pipe.tokenizer], [pipe.text_encoder])


@pytest.fixture
def fitting(sd15_pipeline) -> Subject:
    pipe = sd15_pipeline
    table = pipe.text_encoder.get_input_embeddings().weight
    row = table[class_token_ids(pipe.tokenizer, "person")[0]]
    return make_subject(class_embeddings=[row.detach()])


def test_a_subject_fits_its_base_and_a_fine_tuned_one(sd15_pipeline, fitting):
    pipe = sd15_pipeline
    fitting.check_fits([pipe.tokenizer], [pipe.text_encoder])
    weight = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight += 0.2 * weight.std() * torch.randn(weight.shape)
    fitting.check_fits([pipe.tokenizer], [pipe.text_encoder.half()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [torch.zeros(1, 1, 48)] * 2}, "2 text encoder.*has 1"),
        ({"class_embeddings": [torch.zeros(1, 64)]}, "some/model.* 64 wide.* 48 wide"),
        ({"class_word": "wibble"}, "one token"),
        ({"class_word": "red dog"}, "one token; in this pipeline it is not"),
        ({"class_word": "dog"}, "some/model.*cosine similarity"),
        ({"class_embeddings": [torch.zeros(1, 48)]}, "cosine similarity nan|cosine similarity 0"),
    ],
)
def test_a_subject_does_not_fit_other_models(sd15_pipeline, fitting, change, message):
    for name, value in change.items():
        setattr(fitting, name, value)
    with pytest.raises(SubjectFileError, match=message):
        fitting.check_fits([sd15_pipeline.tokenizer], [sd15_pipeline.text_encoder])
