"""encode: each stage and stream against a changed token table, and no sequence encoded twice."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import accelerate
import pytest
import torch

from sefi_fast.errors import ModelError, PromptError, SubjectFileError
from sefi_fast.prompts import class_token_ids, encode, pack, tokenize_prompts, unpack
from sefi_fast.subject import Subject


def make_subject(pipe, placeholder="<me>", word="person", stages=5, split=True, seed=0, width=48):
    generator = torch.Generator().manual_seed(seed)
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


def assert_encodes(pipe, prompts, subjects, total):
    streams = unpack(encode(pipe, prompts, subjects=subjects), 48)
    assert streams.shape == (len(prompts), total, 2, 77, 48)
    for index, prompt in enumerate(prompts):
        for stage in range(total):
            for stream in range(2):
                expected = expected_stream(pipe, prompt, subjects, stage, total, stream)
                found = streams[index, stage, stream]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def sequences(sd15_pipeline):
    """How many sequences each call of the text encoder had."""
    seen: list[int] = []

    def count(module, inputs):
        seen.append(inputs[0].shape[0])

    sd15_pipeline.text_encoder.register_forward_pre_hook(count)
    return seen


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("stages", [1, 5])
def test_one_subject(sd15_pipeline, stages, split):
    subject = make_subject(sd15_pipeline, stages=stages, split=split)
    assert_encodes(sd15_pipeline, ["a <me> in the snow, <me>'s hat"], [subject], stages)


def test_several_subjects_of_different_stages_and_kinds(sd15_pipeline):
    subjects = [
        make_subject(sd15_pipeline, "<me>", "person", stages=2),
        make_subject(sd15_pipeline, "<it>", "old dog", stages=3, split=False, seed=1),
    ]
    prompts = ["<me> with <it> in the snow", "a <it>", "the <me>", "a red hat"]
    assert_encodes(sd15_pipeline, prompts, subjects, 6)


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
def test_each_distinct_sequence_is_encoded_once(sd15_pipeline, sequences, prompts, count):
    subjects = [
        make_subject(sd15_pipeline, "<me>", "person"),
        make_subject(sd15_pipeline, "<it>", "dog", split=False),
        make_subject(sd15_pipeline, "<two>", "cat", stages=2),
    ]
    found = encode(sd15_pipeline, prompts, subjects=subjects)
    assert sequences == [count]
    assert found.shape == (len(prompts), 77, 10 * (2 * 48 + 1))


def test_prompts_that_come_again_keep_their_places(sd15_pipeline):
    prompts = ["a <me>", "a hat", "a <me>", "a <me> with a hat", "a hat"]
    subjects = [make_subject(sd15_pipeline), make_subject(sd15_pipeline, "<no>", "dog", stages=2)]
    together = encode(sd15_pipeline, prompts, subjects=subjects)
    for row, prompt in zip(together, prompts, strict=True):
        alone = encode(sd15_pipeline, prompt, subjects=subjects)[0]
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)


def test_a_prompt_without_a_placeholder_is_the_plain_prompt(sd15_pipeline):
    pipe = sd15_pipeline
    plain = pipe.encode_prompt("a red cat", "cpu", 1, False)[0]
    for subjects, stages in ([], 1), ([make_subject(pipe)], 5):
        streams = unpack(encode(pipe, "a red cat", subjects=subjects), 48)
        assert torch.equal(streams, plain[:, None, None].expand(1, stages, 2, 77, 48))


def test_clip_skip(sd15_pipeline):
    pipe = sd15_pipeline
    subject = make_subject(pipe)
    ids = tokenize_prompts(pipe.tokenizer, ["a hat"], []).input_ids
    with torch.no_grad():
        hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        norm = [m for n, m in pipe.text_encoder.named_modules() if n.endswith("final_layer_norm")]
        expected = norm[0](hidden)
    found = encode(pipe, "a hat", subjects=subject, clip_skip=1)
    assert torch.equal(unpack(found, 48)[0, 3, 1], expected[0])
    with_subject = encode(pipe, "a <me>", subjects=subject, clip_skip=1)
    assert not torch.allclose(with_subject, encode(pipe, "a <me>", subjects=subject))


def test_dtype_follows_the_text_encoder_and_no_graph_is_kept(sd15_pipeline):
    sd15_pipeline.text_encoder.to(torch.bfloat16)
    found = encode(sd15_pipeline, "a <me>", subjects=make_subject(sd15_pipeline))
    assert found.dtype == torch.bfloat16
    assert not found.requires_grad


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


def test_attached_subjects_are_the_default(sd15_pipeline):
    pipe = sd15_pipeline
    assert encode(pipe, "a <me>").shape == (1, 77, 97)
    subject = make_subject(pipe, stages=3)
    pipe.encode_prompt = SimpleNamespace(subjects=(subject,))
    assert torch.equal(encode(pipe, "a <me>"), encode(pipe, "a <me>", subjects=[subject]))
    assert encode(pipe, "a <me>", subjects=[]).shape == (1, 77, 97)


def test_packed_rows_are_as_pack_lays_them(sd15_pipeline):
    found = encode(sd15_pipeline, ["a <me>", "b"], subjects=make_subject(sd15_pipeline))
    assert torch.equal(pack(unpack(found, 48)), found)
    assert not found[..., 96::97].any()


def test_a_single_subject_may_have_any_number_of_stages(sd15_pipeline):
    subjects = [make_subject(sd15_pipeline, stages=70)]
    assert encode(sd15_pipeline, "a hat", subjects=subjects).shape[2] == 70 * 97


def test_wrong_calls_are_told(sd15_pipeline):
    pipe = sd15_pipeline
    me = make_subject(pipe)
    with pytest.raises(ValueError, match="2 of the subjects have the placeholder '<me>'"):
        encode(pipe, "a", subjects=[me, make_subject(pipe, word="dog")])
    many = [make_subject(pipe, f"<{s}>", stages=s) for s in (11, 13)]
    with pytest.raises(ValueError, match="11, 13 stages need 143"):
        encode(pipe, "a", subjects=many)
    with pytest.raises(SubjectFileError, match=r"base.*\[64\].*\[48\]"):
        encode(pipe, "a", subjects=make_subject(pipe, width=64))
    with pytest.raises(PromptError, match="longer word"):
        encode(pipe, "<me>ow", subjects=me)
    with pytest.raises(TypeError, match="list of strings"):
        encode(pipe, 3, subjects=me)
    with pytest.raises(TypeError, match="list of strings"):
        encode(pipe, ["a", None], subjects=me)
    with pytest.raises(ValueError, match="empty list"):
        encode(pipe, [], subjects=me)


def test_pipelines_of_other_kinds_are_told(sd15_pipeline):
    part = sd15_pipeline.text_encoder
    tokenizer = sd15_pipeline.tokenizer
    two = SimpleNamespace(tokenizer=tokenizer, text_encoder=part, text_encoder_2=part)
    with pytest.raises(ModelError, match="has no tokenizer_2"):
        encode(two, "a")
    two.tokenizer_2 = copy.copy(tokenizer)
    two.tokenizer_2.model_max_length = 64
    with pytest.raises(ModelError, match="take 77 and 64 tokens"):
        encode(two, "a")
    with pytest.raises(ModelError, match="second text encoder of SDXL alone"):
        encode(SimpleNamespace(text_encoder=None, text_encoder_2=part), "a")
    with pytest.raises(ModelError, match="has no tokenizer, which"):
        encode(SimpleNamespace(tokenizer=None, text_encoder=part), "a")
