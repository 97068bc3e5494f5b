"""Placeholders and prompts in one Unicode form."""

from __future__ import annotations

import unicodedata

import pytest

from sefi_fast.errors import PromptError
from sefi_fast.utils.text import check_placeholder, composed, mentions, placeholder_for

DECOMPOSED = unicodedata.normalize("NFD", "café")
NAMES = ["rex 1", "rex-1", "rex  1", "rex\u00a01", "rex_1", "😀", "😁", "हिन्दी", "a b-c", "a-b c"]


def test_text_is_composed():
    assert composed(DECOMPOSED) == "café" != DECOMPOSED
    assert mentions(f"a <{DECOMPOSED}>", "<café>") and not mentions("a <cafe>", "<café>")


@pytest.mark.parametrize("text", ["\ud800", "a \udcff b"])
def test_half_a_character_is_told(text):
    for read in (composed, check_placeholder if " " not in text else composed):
        with pytest.raises(PromptError, match="half a character.*write it again"):
            read(text)


@pytest.mark.parametrize(
    ("name", "placeholder"),
    [
        ("rex", "<rex>"),
        ("mia two", "<mia-two>"),
        (DECOMPOSED, "<café>"),
        ("हिन्दी", "<हिन्दी>"),
        ("👩\u200d🚀 (1)", "<👩\u200d🚀-(1)>"),
    ],
)
def test_a_name_makes_a_whole_placeholder(name, placeholder):
    assert placeholder_for(name) == placeholder == check_placeholder(placeholder)


def test_names_make_distinct_placeholders():
    made = {placeholder_for(name, space=":") for name in NAMES}
    assert len(made) == len(NAMES)
    assert all(check_placeholder(one) == one for one in made)


@pytest.mark.parametrize("placeholder", ["", " ", "two words", "<a\u2003b>", " <a>", "<a>\n"])
def test_a_placeholder_is_one_word(placeholder):
    with pytest.raises(PromptError, match="one word"):
        check_placeholder(placeholder)
    with pytest.raises(TypeError, match="got int"):
        check_placeholder(5)
