"""Tokenising prompts with placeholders: equal to the whole sentence, and clear about mistakes."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from models import WORDS, make_tokenizer

from sefi_fast.errors import PromptError
from sefi_fast.prompts import class_token_ids, placeholder_ids, tokenize_prompts, word_positions
from sefi_fast.prompts.tokenization import read_ids, with_all_vectors


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def person(tokenizer) -> int:
    return class_token_ids(tokenizer, "person")[0]


@pytest.fixture(scope="module")
def dog(tokenizer) -> int:
    return class_token_ids(tokenizer, "dog")[0]


def whole(tokenizer, sentences: list[str]) -> torch.Tensor:
    """Token ids as the pipelines of diffusers make them."""
    return tokenizer(
        sentences,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def slots_of(tokens, row: int = 0) -> dict[int, int]:
    """Position → slot, of the positions that have one."""
    return {i: slot for i, slot in enumerate(tokens.slots[row].tolist()) if slot}


word = st.sampled_from(WORDS.split())
# Without category C: transformers 4 drops such characters and joins what they stood between.
visible = st.characters(exclude_categories=["Cc", "Cf", "Cn", "Co", "Cs"])
strange = st.text(visible, min_size=1, max_size=6)
mark = st.sampled_from([".", ",", "!", "?", "'s", '"', "(", ")", "-", "...", "#", "🙂", "&", ":"])
piece = st.one_of(word, word, mark, strange)
glue = st.sampled_from([" ", " ", " ", "", "  ", "\n", "\t"])
passage = st.lists(st.tuples(piece, glue), max_size=8).map(
    lambda parts: "".join(text + space for text, space in parts)
)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(passage, min_size=2, max_size=4))
@example(parts=["a photo of ", "'s red hat, and ", "."])
@example(parts=["(", ")"])
@example(parts=["", ""])
@example(parts=["#", "!!!"])
@example(parts=["a '", "' photo"])
@example(parts=["🙂\ufe0f", "\ufe0f🙂"])
def test_tokens_are_those_of_the_whole_sentence(tokenizer, person, parts):
    prompt = "<me>".join(parts)
    assume(prompt.count("<me>") == len(parts) - 1)
    # Two class words without a space are one word of the whole sentence.
    assume(all(parts[1:-1]))
    try:
        found = tokenize_prompts(tokenizer, [prompt], [("<me>", [person])])
    except PromptError as error:
        assume("longer word" not in str(error) and "only the first" not in str(error))
        raise
    assert torch.equal(found.input_ids, whole(tokenizer, ["person".join(parts)]))
    assert len(slots_of(found)) == len(parts) - 1
    assert set(found.input_ids[found.slots > 0].tolist()) == {person}


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=120))
def test_plain_prompts_are_tokenised_as_diffusers_does(tokenizer, person, prompt):
    assume("<me>" not in prompt)
    found = tokenize_prompts(tokenizer, [prompt], [("<me>", [person])])
    assert torch.equal(found.input_ids, whole(tokenizer, [prompt]))
    assert not found.slots.any()


def test_several_subjects_and_the_class_word_beside_them(tokenizer, person, dog):
    prompts = [
        "a person and <me> with <dog> and a dog, <me>",
        "<dog>",
        "a person with a dog",
    ]
    found = tokenize_prompts(tokenizer, prompts, [("<me>", [person]), ("<dog>", [dog])])
    plain = [p.replace("<me>", "person").replace("<dog>", "dog") for p in prompts]
    assert torch.equal(found.input_ids, whole(tokenizer, plain))
    assert found.input_ids.dtype == found.slots.dtype == torch.int64
    assert found.slots.shape == (3, 77)
    assert slots_of(found, 0) == {4: 1, 6: 2, 11: 1}
    assert slots_of(found, 1) == {1: 2}
    assert slots_of(found, 2) == {}


def test_placeholders_side_by_side_and_one_within_another(tokenizer, person, dog):
    names = [("<me>", [person]), ("<<me>>", [dog])]
    found = tokenize_prompts(tokenizer, ["<me><me> <<me>>"], names)
    assert slots_of(found) == {1: 1, 2: 1, 3: 2}


def test_a_quoted_placeholder_stays_one_token(tokenizer, dog):
    # The whole sentence would read the contraction 'd and "og" in place of the dog.
    found = tokenize_prompts(tokenizer, ["a '<it>' photo"], [("<it>", [dog])])
    assert slots_of(found) == {3: 1}
    assert found.input_ids[0, 3] == dog


@pytest.mark.parametrize(
    "prompt", ["<me>ow", "a<me>", "x<me> y", "<me>2", "<me>_", "<me>\u0301", "e\u0301<me>"]
)
def test_a_placeholder_in_a_longer_word_is_told(tokenizer, person, prompt):
    with pytest.raises(PromptError, match="longer word"):
        tokenize_prompts(tokenizer, ["fine <me>", prompt], [("<me>", [person])])


@pytest.mark.parametrize("prompt", ["sks", "a sks's hat", "(sks)", "sks-like", "sksy sks"])
def test_a_placeholder_without_brackets(tokenizer, person, prompt):
    found = tokenize_prompts(tokenizer, [prompt], [("sks", [person])])
    assert list(slots_of(found).values()) == [1]


def test_a_word_that_contains_a_plain_placeholder_is_another_word(tokenizer, person):
    found = tokenize_prompts(tokenizer, ["sksy and asks"], [("sks", [person])])
    assert torch.equal(found.input_ids, whole(tokenizer, ["sksy and asks"]))
    assert slots_of(found) == {}


def test_placeholders_are_matched_as_written_not_as_patterns(tokenizer, person):
    found = tokenize_prompts(tokenizer, ["a V* and VVV and <ME> and V."], [("V*", [person])])
    assert list(slots_of(found)) == [2]


@pytest.mark.parametrize("placeholder", ["", "my self", " me"])
def test_impossible_placeholders_are_told(tokenizer, person, placeholder):
    with pytest.raises(PromptError, match="one word"):
        tokenize_prompts(tokenizer, ["a photo"], [(placeholder, [person])])


def test_a_required_placeholder(tokenizer, person, dog):
    names = [("<me>", [person]), ("<dog>", [dog])]
    tokenize_prompts(tokenizer, ["a <dog>"], names, require=True)
    with pytest.raises(PromptError, match="'<me>' or '<dog>'"):
        tokenize_prompts(tokenizer, ["a <dog>", "a person"], names, require=True)


def test_a_long_prompt_is_cut_with_a_warning(tokenizer, person, caplog):
    prompt = "<me> " + "red hat " * 40 + "in the snow"
    with caplog.at_level(logging.WARNING):
        found = tokenize_prompts(tokenizer, [prompt], [("<me>", [person])])
    assert "snow" in caplog.text and "75 tokens" in caplog.text
    assert torch.equal(found.input_ids, whole(tokenizer, [prompt.replace("<me>", "person")]))
    assert found.input_ids[0, 76] == tokenizer.eos_token_id


def test_a_placeholder_at_the_edge_of_the_prompt(tokenizer, person):
    last = tokenize_prompts(tokenizer, ["a " * 74 + "<me>"], [("<me>", [person])])
    assert slots_of(last) == {75: 1}
    with pytest.raises(PromptError, match=r"'<me>' is token 76 .* first 75 are used"):
        tokenize_prompts(tokenizer, ["a " * 75 + "<me>"], [("<me>", [person])])


def test_padding_is_the_tokenizers_own(tmp_path):
    # Stable Diffusion 2.x pads with "!", not with the end of text.
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.pad_token = "!"
    names = [("<me>", class_token_ids(tokenizer, "person"))]
    found = tokenize_prompts(tokenizer, ["a <me>", ""], names)
    assert torch.equal(found.input_ids, whole(tokenizer, ["a person", ""]))
    assert found.input_ids[1, 2] != tokenizer.eos_token_id


def test_no_prompts_and_no_placeholders(tokenizer):
    assert tokenize_prompts(tokenizer, [], []).input_ids.shape == (0, 77)
    found = tokenize_prompts(tokenizer, ["a <me>"], [])
    assert torch.equal(found.input_ids, whole(tokenizer, ["a <me>"]))


def test_a_lone_string_is_told(tokenizer, person):
    with pytest.raises(TypeError, match="list"):
        tokenize_prompts(tokenizer, "a <me>", [("<me>", [person])])
    with pytest.raises(TypeError, match="strings"):
        tokenize_prompts(tokenizer, ["a", 3], [("<me>", [person])])


@pytest.mark.parametrize("length", [int(1e30), "77", 2])
def test_a_tokenizer_without_a_length_is_told(tokenizer, person, monkeypatch, length):
    monkeypatch.setattr(tokenizer, "model_max_length", length)
    with pytest.raises(ValueError, match="model_max_length"):
        tokenize_prompts(tokenizer, ["a <me>"], [("<me>", [person])])


def test_class_word(tokenizer):
    (dog,) = class_token_ids(tokenizer, "dog")
    assert dog == tokenizer("dog").input_ids[1]
    assert class_token_ids(tokenizer, " Dog ") == [dog]
    assert class_token_ids(tokenizer, "red dog") == tokenizer("red dog").input_ids[1:-1]
    for cut in ("wibble", "red wibble"):
        with pytest.raises(PromptError, match=rf"'{cut}' falls into pieces \(.*person, dog"):
            class_token_ids(tokenizer, cut)
    with pytest.raises(PromptError, match=r"9 tokens.*at most 8.*the general word"):
        class_token_ids(tokenizer, "dog " * 9)
    for empty in ("", "  ", "<|endoftext|>"):
        with pytest.raises(PromptError, match="does not know"):
            class_token_ids(tokenizer, empty)


def test_a_placeholder_of_several_tokens(tokenizer):
    ids = class_token_ids(tokenizer, "red dog")
    names = [("<me>", ids), ("<it>", class_token_ids(tokenizer, "hat"))]
    found = tokenize_prompts(tokenizer, ["a <me> with a <it>", "a <it>, <me>"], names)
    # The ids alone are the sentences with the class words.
    assert torch.equal(
        found.input_ids, whole(tokenizer, ["a red dog with a hat", "a hat, red dog"])
    )
    assert found.slots[0, :8].tolist() == [0, 0, 1, 2, 0, 0, 3, 0]
    assert found.slots[1, :7].tolist() == [0, 0, 3, 0, 1, 2, 0]
    assert word_positions(tokenizer, "a <me> with a <it>", "<me>", names) == [2, 3]
    assert word_positions(tokenizer, "a <me>, a red dog", "red dog", names) == [6, 7]
    with pytest.raises(PromptError, match=r"'<me>' is token 76 "):
        tokenize_prompts(tokenizer, ["a " * 74 + "<me>"], names)


def test_the_last_token_of_the_class_word_is_repeated(tokenizer):
    red, dog = class_token_ids(tokenizer, "red dog")
    two = [tokenizer, tokenizer]
    assert placeholder_ids(two, "red dog") == [[red, dog]] * 2
    assert placeholder_ids([tokenizer], "red dog", 4) == [[red, dog, dog, dog]]
    with pytest.raises(PromptError, match=r"^the class word 'red dog' is 2 tokens.*num_vectors"):
        placeholder_ids([tokenizer], "red dog", 1)
    with pytest.raises(PromptError, match="tokenizer of text encoder 1 of 2, the class word"):
        placeholder_ids(two, "red dog", 1)


def test_word_positions(tokenizer, person):
    names = [("<me>", [person])]
    prompt = "a person, <me> and a person's red hat, wibble"
    ids = whole(tokenizer, [prompt.replace("<me>", "person")])[0]
    assert word_positions(tokenizer, prompt, "<me>", names) == [4]
    assert word_positions(tokenizer, prompt, "person", names) == [2, 7]
    assert word_positions(tokenizer, prompt, "red hat", names) == [10, 11]
    assert word_positions(tokenizer, prompt, "RED", names) == [10]
    assert word_positions(tokenizer, prompt, "cat", names) == []
    assert word_positions(tokenizer, prompt, "", names) == []
    assert word_positions(tokenizer, prompt, "<me> and", names) == [4, 5]
    pieces = tokenizer("wibble", add_special_tokens=False).input_ids
    found = word_positions(tokenizer, prompt, "wibble", names)
    assert len(pieces) > 1 and ids[found].tolist() == pieces
    # The end of another word is not the word.
    assert word_positions(tokenizer, "a wibble", "bble", names) == []
    assert word_positions(tokenizer, "a " * 80 + "cat", "cat", names) == []
    assert word_positions(tokenizer, "cat cat", "cat") == [1, 2]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kept", [1, 3, 20])
def test_a_tokenizer_that_another_thread_uses_is_read_and_left_as_it_is(tmp_path, kept, side):
    tokenizer = make_tokenizer(tmp_path)
    text = "a photo of a zebra 🙂 in the snow, <me>"
    expected = tokenizer(text, add_special_tokens=False).input_ids
    rows = tokenize_prompts(tokenizer, [text], [("<me>", [7])])
    backend = tokenizer.backend_tokenizer
    # The other thread's call, between its settings and its encoding.
    backend.enable_truncation(kept, direction=side)
    backend.enable_padding(length=20, direction=side)
    during = backend.truncation, backend.padding
    assert read_ids(tokenizer, text) == expected
    assert class_token_ids(tokenizer, "old dog in snow") == [
        tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in ("old", "dog", "in", "snow")
    ]
    again = tokenize_prompts(tokenizer, [text], [("<me>", [7])])
    assert all(map(torch.equal, again, rows))
    assert word_positions(tokenizer, text, "zebra")
    assert with_all_vectors(TextualInversionLoaderMixin(), [text], tokenizer) == [text]
    assert (backend.truncation, backend.padding) == during
