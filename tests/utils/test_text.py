"""Text that is safe to print, and placeholders and prompts in one Unicode form."""

from __future__ import annotations

import unicodedata

import pytest

from sefi_fast.errors import LONGEST_MESSAGE, PromptError, first_line, printable
from sefi_fast.utils.text import check_placeholder, composed, mentions, placeholder_for

DECOMPOSED = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<me>", "<me>"),
        ("two\nlines", "two\nlines"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("tab\there", "tab\\there"),
        ("\udcff", "\\udcff"),
        ("abc\u202egpj.exe", "abc\\u202egpj.exe"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("हिन्दी <猫> क्\u200dष 👩\u200d🚀", "हिन्दी <猫> क्\u200dष 👩\u200d🚀"),
    ],
)
def test_only_what_a_terminal_obeys_is_escaped(text, shown):
    assert printable(text) == str(PromptError(text)) == shown


def test_long_text_keeps_its_beginning_and_its_end():
    shown = printable("a" * 50_000_000 + "do this", 300)
    assert len(shown) < 320 and shown.startswith("aaa") and shown.endswith("do this")
    assert printable("x" * 300, 300) == "x" * 300


@pytest.mark.parametrize("character", ["\n", "\x1b", "\ue000", "\U000e0001", "猫"])
def test_no_message_fills_more_than_a_screen(character):
    shown = str(PromptError(character * 5000))
    assert len(shown) <= LONGEST_MESSAGE and shown.count("\n") <= 40


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\none\ntwo"), "one"), (MemoryError(), "MemoryError"), (OSError(" "), "OSError")],
)
def test_an_error_has_a_first_line(error, line):
    assert first_line(error) == line


def test_text_is_composed():
    assert composed(DECOMPOSED) == "café" != DECOMPOSED
    assert mentions(f"a <{DECOMPOSED}>", "<café>") and not mentions("a <cafe>", "<café>")


@pytest.mark.parametrize("read", [composed, check_placeholder])
def test_half_a_character_is_refused(read):
    with pytest.raises(PromptError, match="unpaired surrogate.*Write it again"):
        read("\udcff")


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
def test_a_name_gives_one_word_as_placeholder(name, placeholder):
    assert placeholder_for(name) == placeholder == check_placeholder(placeholder)


def test_distinct_names_give_distinct_placeholders():
    names = ["rex 1", "rex-1", "rex  1", "rex\u00a01", "rex_1", "😀", "😁", "a b-c", "a-b c"]
    placeholders = {placeholder_for(name, space=":") for name in names}
    assert len(placeholders) == len(names)
    assert all(check_placeholder(one) == one for one in placeholders)


@pytest.mark.parametrize("placeholder", ["", " ", "two words", "<a\u2003b>", " <a>", "<a>\n", 5])
def test_a_placeholder_is_one_word(placeholder):
    with pytest.raises((PromptError, TypeError), match="one word|got int"):
        check_placeholder(placeholder)
