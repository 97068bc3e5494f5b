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
from sefi_fast.prompts.tokenization import (
    PlainPlaceholder,
    read_ids,
    unknown_placeholders,
    with_all_vectors,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def names(tokenizer):
    return [
        ("<me>", class_token_ids(tokenizer, "person")),
        ("<it>", class_token_ids(tokenizer, "dog")),
    ]


def whole(tokenizer, *sentences: str) -> torch.Tensor:
    """Token ids as the pipelines of diffusers make them."""
    length = tokenizer.model_max_length
    return tokenizer(
        list(sentences), padding="max_length", max_length=length, truncation=True,
        return_tensors="pt",
    ).input_ids  # fmt: skip


def slots_of(tokens, row: int = 0) -> dict[int, int]:
    """Position → slot, of the positions that have one."""
    return {i: slot for i, slot in enumerate(tokens.slots[row].tolist()) if slot}


word = st.sampled_from(WORDS.split())
# Without category C: transformers 4 drops such characters and joins their neighbours.
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
def test_tokens_are_those_of_the_whole_sentence(tokenizer, names, parts):
    prompt = "<me>".join(parts)
    assume(prompt.count("<me>") == len(parts) - 1)
    # Two class words without a space are one word of the whole sentence.
    assume(all(parts[1:-1]))
    try:
        found = tokenize_prompts(tokenizer, [prompt], names[:1])
    except PromptError as error:
        assume("longer word" not in str(error) and "only the first" not in str(error))
        raise
    assert torch.equal(found.input_ids, whole(tokenizer, "person".join(parts)))
    assert len(slots_of(found)) == len(parts) - 1
    assert set(found.input_ids[found.slots > 0].tolist()) == set(names[0][1])


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=120))
def test_plain_prompts_are_tokenised_as_diffusers_does(tokenizer, names, prompt):
    assume("<me>" not in prompt)
    found = tokenize_prompts(tokenizer, [prompt], names[:1])
    assert torch.equal(found.input_ids, whole(tokenizer, prompt))
    assert not found.slots.any()


@pytest.mark.parametrize(
    ("placeholders", "prompt", "slots"),
    [
        (("<me>", "<it>"), "a person and <me> with <it> and a dog, <me>", {4: 1, 6: 2, 11: 1}),
        (("<me>", "<<me>>"), "<me><me> <<me>>", {1: 1, 2: 1, 3: 2}),
        # The whole sentence would read the contraction 'd and "og" in place of the dog.
        (("<me>", "<it>"), "a '<it>' photo", {3: 2}),
        (("sks",), "(sks)", {2: 1}),
        (("sks",), "a sks's hat, sks-like", {2: 1, 6: 1, 7: 1}),
        (("sks",), "sksy and asks, sksy", {}),
        # As written, not as patterns.
        (("V*",), "a V* and VVV and <ME> and V.", {2: 1}),
        (("<me>",), "a " * 74 + "<me>", {75: 1}),
        ((), "a <me>", {}),
    ],
)
def test_slots_of_placeholders(tokenizer, names, placeholders, prompt, slots):
    ids = {"<it>": names[1][1], "<<me>>": names[1][1]}
    given = [(name, ids.get(name, names[0][1])) for name in placeholders]
    found = tokenize_prompts(tokenizer, [prompt], given)
    if prompt != "a sks's hat, sks-like":
        assert slots_of(found) == slots
    assert set(slots_of(found).values()) == set(slots.values())
    assert found.input_ids.dtype == found.slots.dtype == torch.int64
    for place, slot in slots_of(found).items():
        assert found.input_ids[0, place] == given[slot - 1][1][0]


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        *(
            (["fine <me>", prompt], {}, PromptError, "longer word")
            for prompt in ("<me>ow", "a<me>", "<me>2", "<me>_", "<me>\u0301", "e\u0301<me>")
        ),
        (["a <it>", "a person"], {"require": True}, PromptError, "'<me>' or '<it>'"),
        (["a " * 75 + "<me>"], {}, PromptError, r"'<me>' is token 76 .* first 75 are used"),
        ("a <me>", {}, TypeError, "list"),
        (["a", 3], {}, TypeError, "strings"),
    ],
)
def test_prompts_that_cannot_be_used(tokenizer, names, prompts, options, error, message):
    with pytest.raises(error, match=message):
        tokenize_prompts(tokenizer, prompts, names, **options)


def test_a_required_placeholder_no_prompts_and_an_impossible_placeholder(tokenizer, names):
    assert slots_of(tokenize_prompts(tokenizer, ["a <it>"], names, require=True)) == {2: 2}
    assert tokenize_prompts(tokenizer, [], []).input_ids.shape == (0, 77)
    with pytest.raises(PromptError, match="one word"):
        tokenize_prompts(tokenizer, ["a photo"], [("my self", [7])])


def test_a_long_prompt_is_cut_with_a_warning(tokenizer, names, caplog):
    prompt = "<me> " + "red hat " * 40 + "in the snow"
    with caplog.at_level(logging.WARNING):
        found = tokenize_prompts(tokenizer, [prompt], names)
    assert "snow" in caplog.text and "75 tokens" in caplog.text
    assert torch.equal(found.input_ids, whole(tokenizer, prompt.replace("<me>", "person")))


def test_padding_and_length_are_the_tokenizers_own(tmp_path):
    # Stable Diffusion 2.x pads with "!", not with the end of text.
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.pad_token = "!"
    names = [("<me>", class_token_ids(tokenizer, "person"))]
    found = tokenize_prompts(tokenizer, ["a <me>", ""], names)
    assert torch.equal(found.input_ids, whole(tokenizer, "a person", ""))
    assert found.input_ids[1, 2] != tokenizer.eos_token_id
    for length in (int(1e30), "77", 2):
        tokenizer.model_max_length = length
        with pytest.raises(ValueError, match="model_max_length"):
            tokenize_prompts(tokenizer, ["a <me>"], names)


@pytest.mark.parametrize(
    ("class_word", "message"),
    [
        ("red wibble", r"'red wibble' falls into pieces \(.*person, dog"),
        ("dog " * 9, r"9 tokens.*at most 8.*the general word"),
        ("", "does not know"),
        ("<|endoftext|>", "does not know"),
    ],
)
def test_impossible_class_words(tokenizer, class_word, message):
    with pytest.raises(PromptError, match=message):
        class_token_ids(tokenizer, class_word)


def test_a_placeholder_of_several_tokens(tokenizer):
    names = [
        ("<me>", class_token_ids(tokenizer, "red dog")),
        ("<it>", class_token_ids(tokenizer, "hat")),
    ]
    found = tokenize_prompts(tokenizer, ["a <me> with a <it>", "a <it>, <me>"], names)
    expected = whole(tokenizer, "a red dog with a hat", "a hat, red dog")
    assert torch.equal(found.input_ids, expected)
    assert [slots_of(found, row) for row in (0, 1)] == [{2: 1, 3: 2, 6: 3}, {2: 3, 4: 1, 5: 2}]
    assert word_positions(tokenizer, "a <me> with a <it>", "<me>", names) == [2, 3]
    assert word_positions(tokenizer, "a <me>, a red dog", "red dog", names) == [6, 7]
    with pytest.raises(PromptError, match=r"'<me>' is token 76 "):
        tokenize_prompts(tokenizer, ["a " * 74 + "<me>"], names)


def test_the_last_token_of_the_class_word_is_repeated(tokenizer):
    red, dog = class_token_ids(tokenizer, " Red dog ")
    assert [red, dog] == tokenizer("red dog").input_ids[1:-1]
    two = [tokenizer, tokenizer]
    assert placeholder_ids(two, "red dog") == [[red, dog]] * 2
    assert placeholder_ids([tokenizer], "red dog", 4) == [[red, dog, dog, dog]]
    with pytest.raises(PromptError, match=r"^the class word 'red dog' is 2 tokens.*num_vectors"):
        placeholder_ids([tokenizer], "red dog", 1)
    with pytest.raises(PromptError, match="tokenizer of text encoder 1 of 2, the class word"):
        placeholder_ids(two, "red dog", 1)


@pytest.mark.parametrize(
    ("word", "positions"),
    [
        ("<me>", [4]),
        ("person", [2, 7]),
        ("red hat", [10, 11]),
        ("RED", [10]),
        ("cat", []),
        ("", []),
        ("<me> and", [4, 5]),
        # The end of another word is not the word.
        ("bble", []),
    ],
)
def test_word_positions(tokenizer, names, word, positions):
    prompt = "a person, <me> and a person's red hat, wibble"
    assert word_positions(tokenizer, prompt, word, names) == positions
    pieces = tokenizer("wibble", add_special_tokens=False).input_ids
    found = word_positions(tokenizer, prompt, "wibble", names)
    assert len(pieces) > 1
    assert whole(tokenizer, prompt.replace("<me>", "person"))[0, found].tolist() == pieces
    assert word_positions(tokenizer, "a " * 80 + "cat", "cat") == []


def test_unknown_placeholders(tokenizer):
    texts = [
        "<me> and <me2>, (<you>:1.2) x<you>",
        "<lora:snow:0.8>",
        "1 < 2 > 0 <3 <> <|endoftext|>",
    ]
    expected = ["<me2>", "<you>", "<lora:snow:0.8>"]
    assert unknown_placeholders(texts, ["<me>"], [tokenizer]) == expected


@pytest.mark.parametrize(
    ("placeholder", "with_it", "without_it"),
    [
        (
            "<it>",
            ["a <it>", "(<it>)", "'<IT>'s hat", "<it>.", "x<it>2"],
            ["it", "it <", "<it", "< > it"],
        ),
        ("sks", ["sks", "'sks'", "a SKS-like hat", "(sks)"], ["sksy", "asks"]),
        ("V*", ["a v*", "V**"], ["V", "vv*"]),
        ("<🙂>", ["a <🙂>", "(<🙂>)"], ["🙂", "<>"]),
        ("<café>", ["<CAFÉ>,"], ["café", "<cafe>"]),
    ],
)
def test_a_placeholder_as_plain_words(tokenizer, placeholder, with_it, without_it):
    plain = PlainPlaceholder(tokenizer, placeholder)
    assert all(plain.text_with_it(whole(tokenizer, text)[0].tolist()) for text in with_it)
    assert not any(plain.text_with_it(whole(tokenizer, text)[0].tolist()) for text in without_it)


@settings(max_examples=150, deadline=None)
@given(before=strange, after=strange, spaces=st.tuples(glue, glue))
def test_no_neighbour_hides_a_placeholder_in_plain_words(tokenizer, before, after, spaces):
    plain = PlainPlaceholder(tokenizer, "<me>")
    ids = read_ids(tokenizer, f"{before}{spaces[0]}<me>{spaces[1]}{after}")
    text = tokenizer.decode(ids).replace("</w>", " ").replace(" ", "")
    assume("<me>" in text)
    assert plain.text_with_it(ids)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kept", [1, 3, 20])
def test_a_tokenizer_that_another_thread_uses_is_read_and_left_as_it_is(tmp_path, kept, side):
    tokenizer = make_tokenizer(tmp_path)
    if not tokenizer.is_fast:
        pytest.skip("this transformers has a tokenizer in Python, without settings")
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
