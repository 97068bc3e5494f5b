"""encode: each stage and stream against a changed token table, and no sequence encoded twice."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch

from sefi_fast.errors import PromptError, SubjectFileError
from sefi_fast.prompts import class_token_ids, encode, encode_text, pack, tokenize_prompts, unpack
from sefi_fast.subject import Subject


def make_subject(pipe, placeholder="<me>", word="person", stages=5, split=True, width=48):
    generator = torch.Generator().manual_seed(len(placeholder) + stages)
    table = pipe.text_encoder.get_input_embeddings().weight
    rows = table[class_token_ids(pipe.tokenizer, word)]
    return Subject(
        placeholder,
        word,
        [torch.randn(stages, 2 if split else 1, len(rows), width, generator=generator)],
        [rows if width == rows.shape[1] else torch.ones(len(rows), width)],
        "base",
    )


@torch.no_grad()
def expected_stream(pipe, prompt, subjects, stage, total, stream):
    """One sequence [M, C], encoded alone by a text encoder whose table holds the subjects' rows."""
    text_encoder = copy.deepcopy(pipe.text_encoder)
    for subject in subjects:
        tokens = subject.tokens[0]
        rows = tokens[stage * subject.stages // total, min(stream, tokens.shape[1] - 1)]
        token_ids = class_token_ids(pipe.tokenizer, subject.class_word)
        text_encoder.get_input_embeddings().weight[token_ids] = rows
        prompt = prompt.replace(subject.placeholder, subject.class_word)
    ids = pipe.tokenizer(
        prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return text_encoder(ids).last_hidden_state[0]


ME, IT = {"stages": 2}, {"placeholder": "<it>", "word": "old dog", "stages": 3, "split": False}
SENTENCE = "a <me> in the snow, <me>'s hat"
FOUR = ["<me> with <it> in the snow", "a <it>", "the <me>", "a red hat"]


@pytest.mark.parametrize(
    ("options", "prompts", "total"),
    [
        ([{"stages": 1}], [SENTENCE], 1),
        ([{"stages": 5}], [SENTENCE], 5),
        ([{"stages": 5, "split": False}], [SENTENCE], 5),
        ([ME, IT], FOUR, 6),
    ],
)
def test_every_stage_and_stream(sd15_pipeline, options, prompts, total):
    subjects = [make_subject(sd15_pipeline, **one) for one in options]
    packed = encode(sd15_pipeline, prompts, subjects=subjects)
    streams = unpack(packed, 48)
    assert torch.equal(pack(streams), packed)
    assert streams.shape == (len(prompts), total, 2, 77, 48)
    for index, prompt in enumerate(prompts):
        for stage in range(total):
            for stream in range(2):
                expected = expected_stream(sd15_pipeline, prompt, subjects, stage, total, stream)
                found = streams[index, stage, stream]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        (["a <me>"], 10),
        (["a hat"], 1),
        (["a <it>"], 5),
        (["a <me> and <it>"], 10),
        (["a <two>"], 4),
        (["a <me> and <two>"], 20),
        (["a <me>", "a hat", "a <it>", "a <two> and a <two>"], 10 + 1 + 5 + 4),
        (["a <me>", "a hat", "a <me>", "a <me>", "a hat"], 10 + 1),
    ],
)
def test_each_distinct_sequence_is_encoded_once_and_placed(sd15_pipeline, prompts, count):
    pipe, seen = sd15_pipeline, []
    subjects = [
        make_subject(pipe, "<me>", "person"),
        make_subject(pipe, "<it>", "dog", split=False),
        make_subject(pipe, "<two>", "cat", stages=2),
    ]
    handle = pipe.text_encoder.register_forward_pre_hook(lambda _, ids: seen.append(len(ids[0])))
    found = encode(pipe, prompts, subjects=subjects)
    handle.remove()
    assert seen == [count]
    assert found.shape == (len(prompts), 77, 10 * (2 * 48 + 1))
    for row, prompt in zip(found, prompts, strict=True):
        alone = encode(pipe, prompt, subjects=subjects)[0]
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)


def test_a_prompt_without_a_placeholder_is_the_plain_prompt(sd15_pipeline):
    pipe = sd15_pipeline
    plain = pipe.encode_prompt("a red cat", "cpu", 1, False)[0]
    for subjects, stages in (
        ([], 1),
        ([make_subject(pipe)], 5),
        ([make_subject(pipe, stages=70)], 70),
    ):
        streams = unpack(encode(pipe, "a red cat", subjects=subjects), 48)
        assert torch.equal(streams, plain[:, None, None].expand(1, stages, 2, 77, 48))


def test_clip_skip_dtype_and_no_graph(sd15_pipeline):
    pipe, subject = sd15_pipeline, make_subject(sd15_pipeline)
    ids = tokenize_prompts(pipe.tokenizer, ["a hat"], []).input_ids
    pipe.text_encoder.to(torch.bfloat16)
    found = encode(pipe, "a hat", subjects=subject, clip_skip=1)
    with torch.no_grad():
        expected = encode_text(pipe.text_encoder, ids, clip_skip=1)
    assert torch.equal(unpack(found, 48)[0, 3, 1], expected[0])
    with_subject = encode(pipe, "a <me>", subjects=subject, clip_skip=1)
    assert with_subject.dtype == torch.bfloat16 and not with_subject.requires_grad
    assert not torch.allclose(with_subject, encode(pipe, "a <me>", subjects=subject))


def test_a_sequentially_offloaded_pipeline(sd15_pipeline):
    pipe = sd15_pipeline
    subject = make_subject(pipe)
    expected = encode(pipe, ["a <me> in the snow", "a hat"], subjects=subject)
    for model in (pipe.vae, pipe.text_encoder, pipe.unet):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert pipe.text_encoder.device.type == "meta"
    subject.check_fits([pipe.tokenizer], [pipe.text_encoder])
    assert torch.equal(encode(pipe, ["a <me> in the snow", "a hat"], subjects=subject), expected)
    subject.class_word = "dog"
    with pytest.raises(SubjectFileError, match="cosine similarity"):
        subject.check_fits([pipe.tokenizer], [pipe.text_encoder])


@pytest.mark.parametrize(
    ("options", "prompt", "error", "message"),
    [
        ([{}, {"word": "dog"}], "a", ValueError, "2 of the subjects have the placeholder"),
        (
            [{"stages": 11}, {"placeholder": "<it>", "stages": 13}],
            "a",
            ValueError,
            "11, 13 stages need 143",
        ),
        ([{"width": 64}], "a", SubjectFileError, r"base.*\[64\].*\[48\]"),
        ([{}], "<me>ow", PromptError, "longer word"),
        ([{}], 3, TypeError, "list of strings"),
        ([{}], ["a", None], TypeError, "list of strings"),
        ([{}], [], ValueError, "empty list"),
    ],
)
def test_wrong_calls(sd15_pipeline, options, prompt, error, message):
    subjects = [make_subject(sd15_pipeline, **one) for one in options]
    with pytest.raises(error, match=message):
        encode(sd15_pipeline, prompt, subjects=subjects)
