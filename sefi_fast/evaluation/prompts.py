"""Prompts for scoring a subject on scenes, actions, attributes and with another subject."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from sefi_fast.errors import PromptError, printable
from sefi_fast.utils.files import read_regular, user_path

_SIZE_LIMIT = 2**20

Prompts = Mapping[str, tuple[str, ...]]
"""Class of prompts → sentences with {} in place of the subject, twice for two subjects."""

PERSON_PROMPTS: Prompts = {
    "scenes": (
        "a photo of {} in front of the Eiffel Tower",
        "a photo of {} on the beach",
        "a photo of {} in the snow",
        "a photo of {} in a library full of books",
        "a photo of {} on the moon",
        "a photo of {} in Times Square at night",
    ),
    "actions": (
        "a photo of {} holding a basketball",
        "a photo of {} holding a cup",
        "a photo of {} riding a bicycle",
        "a photo of {} playing the guitar",
        "a photo of {} cooking in a kitchen",
        "a photo of {} reading a book",
    ),
    "attributes": (
        "a photo of {} with eyes closed",
        "a photo of an old {}",
        "a photo of {} with a beard",
        "a photo of {} wearing sunglasses",
        "a photo of {} laughing",
        "a photo of {} with blue hair",
    ),
    "several": (
        "a photo of {} and {} in front of the Eiffel Tower",
        "a photo of {} and {} shaking hands",
        "a photo of {} and {} sitting on a sofa",
        "a photo of {} hugging {}",
    ),
}
"""Prompts for people. The authors' page names the Eiffel Tower, the basketball, the cup, closed
eyes, the beard, old age and the books. The other prompts of these classes are ours."""

THING_PROMPTS: Prompts = {
    "scenes": (
        "a photo of a {} in front of the Eiffel Tower",
        "a photo of a {} on the beach",
        "a photo of a {} in the snow",
        "a photo of a {} in the jungle",
        "a photo of a {} on a wooden floor",
        "a photo of a {} in a city at night",
    ),
    "actions": (
        "a photo of a {} floating on water",
        "a photo of a {} on top of a red carpet",
        "a photo of a {} next to a basketball",
        "a photo of a {} beside a cup",
    ),
    "attributes": (
        "a photo of a red {}",
        "a photo of a wet {}",
        "a photo of a {} wearing a hat",
        "an oil painting of a {}",
    ),
    "several": (
        "a photo of a {} and a {} on the beach",
        "a photo of a {} next to a {}",
    ),
}
"""Prompts for animals and things, all of them ours."""

TINY_PROMPTS: Prompts = {
    "scenes": (
        "a photo of a {} on the beach on the left",
        "a photo of a {} in the snow on the right",
        "a photo of a {} in the city in the middle",
        "a photo of a {} at night on the left",
    ),
    "accessories": (
        "a photo of a {} with a hat in the forest on the right",
        "a photo of a {} with a crown and a ball in the snow on the left",
        "a photo of a {} with a hat and a scarf and a ball in the city on the right",
        "a photo of a {} with a crown and a scarf in the desert in the middle",
    ),
    "attributes": (
        "a photo of a {} with long ears with a ball in the forest on the left",
        "a photo of a {} with pointy ears with a scarf on the beach on the right",
        "a photo of a tall {} with a hat in the snow on the left",
        "a photo of a {} with green stripes with a crown in the city",
    ),
}
"""Prompts for the bundled model."""

_PEOPLE = {"person", "man", "woman", "boy", "girl", "child", "baby", "lady", "guy", "face"}


def prompts_for(class_word: str, bundled: bool = False) -> Prompts:
    """Return the prompts that suit a class word, on the bundled model or another."""
    if bundled:
        return TINY_PROMPTS
    return PERSON_PROMPTS if class_word.lower() in _PEOPLE else THING_PROMPTS


def filled(prompt: str, words: Iterable[str]) -> str:
    """Return the prompt with a word for each {}. Other braces stay."""
    parts = prompt.split("{}")
    return "".join(part for pair in zip(parts, [*words, ""], strict=True) for part in pair)


def check_prompt(prompt: str, place: str = "The prompt") -> None:
    """Raise PromptError if a prompt is not for one subject or two."""
    if not 1 <= (count := prompt.count("{}")) <= 2:
        raise PromptError(
            f"{place} {printable(prompt, 200)!r} has {{}} {count} times. Write it in place of the "
            "subject, or twice for two subjects."
        )


def read_prompts(path: str | Path) -> Prompts:
    """Read prompts from a text file, one per line. A line "# scenes" begins a class of that name.

    Raises:
        OSError: the file cannot be read.
        PromptError: the file is not UTF-8 text, or holds no prompt, or one without {} or with more
            than two.
    """
    try:
        text = read_regular(user_path(path), _SIZE_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path} cannot be read as UTF-8 text ({error}). Give a text file, one prompt per line."
        ) from error
    classes: dict[str, list[str]] = {}
    name = "prompts"
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if line.startswith("#"):
            name = line.lstrip("# ") or name
        elif line:
            check_prompt(line, f"{path}, line {number}:")
            classes.setdefault(name, []).append(line)
    if not classes:
        raise PromptError(
            f"{path} holds no prompt. Write one per line, with {{}} in place of the subject."
        )
    return {name: tuple(lines) for name, lines in classes.items()}
