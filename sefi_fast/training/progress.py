"""The progress bar of a run, with small pictures in it where the terminal can."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sefi_fast.training.history import History
from sefi_fast.utils.text import printable

_THUMBNAIL = 24
_RECENT = 20
_LONGEST_TITLE = 40


class Progress:
    """A bar with the loss and alignment of late, and the seconds left; on the error stream.

    Args:
        title: what stands before the bar.
        steps: of the whole run.
        done: steps done before this process.
        shown: False for no output at all.
    """

    def __init__(self, title: str, steps: int, done: int, shown: bool) -> None:
        name = printable(title, _LONGEST_TITLE)
        # Even a disabled bar takes a lock that forked processes share.
        self._bar = tqdm(total=steps, initial=done, unit="step", desc=name) if shown else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, histories: Sequence[History]) -> None:
        """One more step, with means over the subjects and the last twenty steps."""
        if self._bar is None:
            return
        seen = [history for history in histories if history.loss]
        if seen:
            values: dict[str, str] = {}
            for name in ("loss", "alignment"):
                tails = [getattr(history, name)[-_RECENT:] for history in seen]
                mean = sum(sum(tail) / len(tail) for tail in tails) / len(tails)
                values[name] = f"{mean:.3g}"
            if len(seen) > 1:
                values["subjects"] = str(len(seen))
            self._bar.set_postfix(values, refresh=False)
        self._bar.update()

    def pictures(self, drawn: Sequence[Image.Image]) -> None:
        """Show pictures above the bar, if the terminal has colours."""
        if self._bar is not None and drawn and shows_colours(sys.stderr):
            self._bar.write(thumbnails(drawn), file=sys.stderr)


def shows_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal that says it has 24-bit colours."""
    return stream.isatty() and os.environ.get("COLORTERM") in ("truecolor", "24bit")


def thumbnails(pictures: Sequence[Image.Image], side: int = _THUMBNAIL) -> str:
    """Pictures side by side as lines of half blocks in 24-bit colours, two pixels a character."""
    squares = [np.asarray(picture.convert("RGB").resize((side, side))) for picture in pictures]
    gap = np.zeros((side, 1, 3), dtype=np.uint8)
    row = np.concatenate([part for square in squares for part in (square, gap)][:-1], axis=1)
    lines = []
    for upper, lower in zip(row[0::2].tolist(), row[1::2].tolist(), strict=True):
        cells = [
            "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*top, *bottom)
            for top, bottom in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
