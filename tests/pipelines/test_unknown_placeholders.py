"""A word in angle brackets whose subject was forgotten is told once, and nothing else is."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from pipelines.sampling import draw, subject_for

from sefi_fast import attach, regions
from sefi_fast.prompts.tokenization import unknown_placeholders

QUICK = {"num_inference_steps": 1}


@pytest.fixture
def told(caplog):
    """The warnings so far, in one text each."""
    caplog.set_level(logging.WARNING, logger="sefi_fast")
    return lambda: [r.getMessage() for r in caplog.records if "placeholder" in r.getMessage()]


@pytest.mark.parametrize("name", ["sd15_pipeline", "sdxl_pipeline"])
def test_a_forgotten_subject_is_told_once(request, told, name):
    pipe = request.getfixturevalue(name)
    attach(pipe, [subject_for(pipe), subject_for(pipe, "<me>", "person")])
    draw(pipe, "a <it> and a <me>, a <you>", **QUICK)
    (message,) = told()
    assert "'<you>'" in message and "attached: '<it>', '<me>'" in message
    draw(pipe, ["a <you>", "a cat"], **QUICK)
    assert len(told()) == 1
    draw(pipe, "a cat", negative_prompt="an <other>", **QUICK)
    assert "'<other>'" in told()[1]
    draw(copy.deepcopy(pipe), "a <you>", **QUICK)
    assert len(told()) == 3


def test_words_that_the_tokenizer_knows_are_not(sd15_pipeline, told):
    pipe = sd15_pipeline
    pipe.load_textual_inversion({"<cat-toy>": torch.randn(2, 48)}, token="<cat-toy>")
    attach(pipe, [subject_for(pipe), subject_for(pipe, "<it>-2", "person")])
    for prompt in ("a <cat-toy> with <it>", "<it>-2", "a <|endoftext|>", "1 < 2 > 0 <3 <>"):
        draw(pipe, prompt, **QUICK)
    assert told() == []


def test_the_prompts_of_regions_are_looked_at_too(sd15_pipeline, told):
    with regions(sd15_pipeline, {"a <me>": (0, 0, 0.5, 1)}):
        draw(sd15_pipeline, "a cat", **QUICK)
    (message,) = told()
    assert "'<me>'" in message and "attached: none" in message


def test_pieces_of_longer_words_count(sd15_pipeline):
    texts = ["<me> and <me2>, (<you>:1.2) x<you>", "<lora:snow:0.8>"]
    found = unknown_placeholders(texts, ["<me>"], [sd15_pipeline.tokenizer])
    assert found == ["<me2>", "<you>", "<lora:snow:0.8>"]
