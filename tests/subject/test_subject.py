"""The subject: its parts fit one another, and it fits the models it was made for."""

from __future__ import annotations

import pytest
import torch
from subject.making import make_subject

from sefi_fast.errors import SubjectFileError
from sefi_fast.prompts import class_token_ids
from sefi_fast.subject import Subject


def test_a_subject_does_not_follow_its_training():
    rows = torch.zeros(5, 2, 4, requires_grad=True)
    subject = Subject("<me>", "person", [rows], [torch.zeros(4, dtype=torch.float16)], "base")
    with torch.no_grad():
        rows += 1
    assert torch.equal(subject.tokens[0], torch.zeros(5, 2, 1, 4))
    assert not subject.tokens[0].requires_grad
    assert subject.class_embeddings[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placeholder": ""}, "placeholder"),
        ({"placeholder": "my self"}, "placeholder"),
        ({"class_word": " "}, "class_word"),
        ({"tokens": []}, "each text encoder"),
        ({"tokens": [torch.zeros(5, 3, 48)]}, r"\[stages, 2, vectors, C\]"),
        ({"tokens": [torch.zeros(5, 48)]}, r"\[stages, 2, vectors, C\]"),
        ({"tokens": [torch.zeros(5, 2, 0, 48)]}, r"\[stages, 2, vectors, C\]"),
        ({"tokens": [torch.zeros(5, 2, 40)]}, "does not fit"),
        ({"class_embeddings": [torch.zeros(2, 48)]}, "does not fit"),
        ({"class_embeddings": [torch.zeros(0, 48)]}, "does not fit"),
        ({"tokens": [torch.full((5, 2, 48), float("nan"))]}, "NaN"),
    ],
)
def test_parts_that_do_not_fit_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        make_subject(**fields)


def test_text_encoders_must_agree_on_stages():
    with pytest.raises(ValueError, match="alike"):
        make_subject(
            widths=(8, 8),
            tokens=[torch.zeros(5, 2, 8), torch.zeros(4, 2, 8)],
        )


def test_every_token_of_the_class_word_is_compared(sd15_pipeline):
    pipe = sd15_pipeline
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    rows = table[class_token_ids(pipe.tokenizer, "red dog")]
    subject = make_subject(vectors=3, class_word="red dog", class_embeddings=[rows])
    subject.check_fits([pipe.tokenizer], [pipe.text_encoder])
    placeholder, ids = subject.in_prompts(pipe.tokenizer)
    assert placeholder == "<me>"
    assert ids == [*class_token_ids(pipe.tokenizer, "red dog"), ids[1]]
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


def test_a_subject_does_not_fit_other_models(sd15_pipeline, fitting):
    pipe = sd15_pipeline
    with pytest.raises(SubjectFileError, match="2 text encoder.*has 1"):
        make_subject(widths=(48, 48)).check_fits([pipe.tokenizer], [pipe.text_encoder])
    with pytest.raises(SubjectFileError, match="some/model.* 64 wide.* 48 wide"):
        make_subject(widths=(64,)).check_fits([pipe.tokenizer], [pipe.text_encoder])
    fitting.class_word = "wibble"
    with pytest.raises(SubjectFileError, match="one token"):
        fitting.check_fits([pipe.tokenizer], [pipe.text_encoder])
    fitting.class_word = "red dog"
    with pytest.raises(SubjectFileError, match="one token; in this pipeline it is not"):
        fitting.check_fits([pipe.tokenizer], [pipe.text_encoder])
    fitting.class_word = "dog"
    with pytest.raises(SubjectFileError, match="some/model.*cosine similarity"):
        fitting.check_fits([pipe.tokenizer], [pipe.text_encoder])


def test_a_zero_embedding_does_not_pass_for_similar(sd15_pipeline, fitting):
    fitting.class_embeddings = [torch.zeros(1, 48)]
    with pytest.raises(SubjectFileError, match="cosine similarity"):
        fitting.check_fits([sd15_pipeline.tokenizer], [sd15_pipeline.text_encoder])
