"""The progress bar's thumbnails: the images' own colours, in terminals that have them only."""

from __future__ import annotations

import io
import re

from PIL import Image

from sefi_fast.training import History
from sefi_fast.training.monitor import Progress, shows_colours, thumbnails


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_thumbnails_are_half_blocks_in_the_pictures_colours():
    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 2, 4, 4))
    lines = thumbnails([picture, Image.new("L", (9, 9), 128)], side=4).splitlines()
    assert len(lines) == 2
    assert all(line.count("▀") == 4 + 1 + 4 for line in lines)
    colours = [re.findall(r"\[38;2;(\d+;\d+;\d+)m\x1b\[48;2;(\d+;\d+;\d+)m", x) for x in lines]
    assert colours[0][0] == ("255;0;0", "255;0;0") and colours[1][0] == ("0;0;255", "0;0;255")
    assert colours[0][5] == ("128;128;128", "128;128;128")


def test_only_terminals_that_say_so_have_colours(monkeypatch):
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert shows_colours(Terminal()) and not shows_colours(io.StringIO())
    monkeypatch.setenv("COLORTERM", "")
    assert not shows_colours(Terminal())


def test_the_bar_shows_pictures_and_means(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLORTERM", "24bit")
    histories = [History([1.0], [0.5], [0.1]), History([3.0], [1.5], [0.1]), History()]
    with Progress("two of three", 4, 1, True) as bar:
        bar.step(histories)
        bar.pictures([Image.new("RGB", (8, 8), (1, 2, 3))])
    text = stream.getvalue()
    assert "two of three" in text and "2/4" in text
    assert "loss=2" in text and "subject_loss=1" in text and "subjects=2" in text
    assert "38;2;1;2;3" in text
    silent = Terminal()
    monkeypatch.setattr("sys.stderr", silent)
    with Progress("none", 4, 0, False) as bar:
        bar.step(histories)
        bar.pictures([Image.new("RGB", (8, 8))])
    assert silent.getvalue() == ""
