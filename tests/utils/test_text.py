"""Text that is safe to print on every terminal."""

from __future__ import annotations

import pytest

from sefi_fast.errors import LONGEST_MESSAGE, PromptError, printable


@pytest.mark.parametrize(
    "text, shown",
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
    assert printable(text) == shown
    assert str(PromptError(text)) == shown


def test_long_text_keeps_its_beginning_and_its_end():
    shown = printable("a" * 50_000_000 + "do this", 300)
    assert len(shown) < 320 and shown.startswith("aaa") and shown.endswith("do this")
    assert printable("x" * 300, 300) == "x" * 300


@pytest.mark.parametrize("character", ["\n", "\x1b", "\ue000", "\U000e0001", "猫"])
def test_no_text_fills_more_than_a_screen(character):
    shown = str(PromptError(character * 5000))
    assert len(shown) <= LONGEST_MESSAGE and shown.count("\n") <= 40
