"""Tokenise prompts in which placeholders stand for subjects."""

from __future__ import annotations

import itertools
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from sefi_fast.errors import ModelError, PromptError, printable
from sefi_fast.utils.text import check_placeholder, composed

logger = logging.getLogger(__name__)

Placeholder = tuple[str, Sequence[int]]
"""A placeholder, and the class word's token ids where its own tokens stand in a sentence."""

_MOST_CLASS_TOKENS = 8
_CLASS_WORDS = ("person", "dog", "toy", "creature")


class PromptTokens(NamedTuple):
    """Token ids of P prompts of M positions, and where the subjects stand in them.

    input_ids: int64 [P, M], with the class word's ids where a placeholder stood, so that the ids
        alone are the reference prompt.
    slots: int64 [P, M], 0 where the token table's own row belongs and k where the k-th row
        (counted from 1) of the placeholders does, those of the first one before those of the
        second.
    """

    input_ids: Tensor
    slots: Tensor


class _Token(NamedTuple):
    token_id: int
    slot: int


def class_token_ids(tokenizer: Any, class_word: str) -> list[int]:
    """The token ids of a class word, one a word: of "person" one, of "golden retriever" two.

    Raises:
        PromptError: the tokenizer does not know one of its words, or cuts it into pieces; or there
            are more than 8.
    """
    ids = read_ids(tokenizer, class_word)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if not ids or tokenizer.unk_token_id in ids:
        raise PromptError(
            f"the tokenizer does not know the class word {class_word!r}; choose a common word "
            f"that is one token ({_examples(tokenizer)})"
        )
    added = tokenizer.get_added_vocab()
    if any(not piece.endswith("</w>") and piece not in added for piece in pieces):
        raise PromptError(
            f"the class word {class_word!r} falls into pieces ({len(pieces)} tokens); choose words "
            f"that are one token each, such as the general word for it ({_examples(tokenizer)})"
        )
    if len(ids) > _MOST_CLASS_TOKENS:
        raise PromptError(
            f"the class word {class_word!r} is {len(ids)} tokens, at most {_MOST_CLASS_TOKENS} are "
            f"possible; choose the general word for it ({_examples(tokenizer)})"
        )
    return ids


def _examples(tokenizer: Any) -> str:
    """Class words that this tokenizer knows; the bundled model's knows few."""
    vocabulary = tokenizer.get_vocab()
    return ", ".join(word for word in _CLASS_WORDS if f"{word}</w>" in vocabulary)


def with_all_vectors(pipe: Any, prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """The prompts with every vector of embeddings that diffusers loaded, which it numbers."""
    if not isinstance(pipe, TextualInversionLoaderMixin):
        return list(prompts)
    # The tokenizer's own `tokenize` would change the state that other threads encode by.
    reader = SimpleNamespace(
        tokenize=lambda text: tokenizer.convert_ids_to_tokens(read_ids(tokenizer, text)),
        added_tokens_encoder=tokenizer.added_tokens_encoder,
    )
    return list(pipe.maybe_convert_prompt(list(prompts), reader))


def placeholder_ids(
    tokenizers: Sequence[Any], class_word: str, num_vectors: int | None = None
) -> list[list[int]]:
    """For each tokenizer of a pipeline, the class word's token ids where a placeholder stands.

    Args:
        tokenizers: of the pipeline.
        class_word: one token or several.
        num_vectors: how many tokens stand for the placeholder; default: as many as the class word
            has. Where it has fewer its last one is repeated.

    Raises:
        PromptError: a tokenizer does not know the class word, or it has more than `num_vectors`
            tokens; the tokenizer is named.
    """
    found = []
    for number, tokenizer in enumerate(tokenizers, 1):
        try:
            ids = class_token_ids(tokenizer, class_word)
            found.append(padded(ids, num_vectors or len(ids), class_word))
        except PromptError as error:
            if len(tokenizers) == 1:
                raise
            raise PromptError(
                f"for the tokenizer of text encoder {number} of {len(tokenizers)}, {error}"
            ) from error
    count = max(map(len, found))
    return [padded(ids, count, class_word) for ids in found]


def padded(ids: Sequence[int], count: int, class_word: str) -> list[int]:
    """Ids of a class word, the last one repeated up to `count`.

    Raises:
        PromptError: there are more than that.
    """
    if len(ids) > count:
        raise PromptError(
            f"the class word {class_word!r} is {len(ids)} tokens, and {count} stand(s) for the "
            "subject (num_vectors); use more, or a class word of fewer tokens"
        )
    return [*ids, *[ids[-1]] * (count - len(ids))]


def tokenize_prompts(
    tokenizer: Any,
    prompts: Sequence[str],
    placeholders: Sequence[Placeholder],
    *,
    require: bool = False,
) -> PromptTokens:
    """Token ids and slots of prompts, padded to ``tokenizer.model_max_length``.

    The text on either side of a placeholder is tokenised by itself. For CLIP's tokenizer, which
    never lets a token cross from one word to the next, this gives what the whole sentence gives
    with the class word in the placeholder's stead. (It also holds the class word together where
    the whole sentence would not: ``'dog'`` in quotes begins with the contraction ``'d``.)
    A prompt that is too long is cut as diffusers cuts it, with a warning.

    Args:
        tokenizer: a CLIPTokenizer or CLIPTokenizerFast.
        prompts: P sentences.
        placeholders: each with the class word's ids that stand in its place in the reference
            prompt, as many as the placeholder has tokens; the order gives the slot numbers. A
            placeholder counts where it stands as it is written and not inside a longer word.
        require: refuse prompts without any of the placeholders.

    Raises:
        PromptError: a placeholder runs into a longer word, stands where the prompt is cut off, or
            (require) is missing.
        TypeError: prompts are no sequence of strings.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts must be a sequence of strings; put a single prompt into a list")
    rows = [_layout(tokenizer, prompt, placeholders, require) for prompt in prompts]
    shape = (len(rows), _length(tokenizer))
    return PromptTokens(
        torch.tensor([[token.token_id for token in row] for row in rows]).view(shape).long(),
        torch.tensor([[token.slot for token in row] for row in rows]).view(shape).long(),
    )


def word_positions(
    tokenizer: Any, prompt: str, word: str, placeholders: Sequence[Placeholder] = ()
) -> list[int]:
    """Token positions of each place where a word, a phrase or a placeholder stands in a prompt.

    Positions count the start-of-text token. A word of several tokens gives all of them; a class
    word is not found where a placeholder stands for it. The list is empty if the word is absent
    or cut off.
    """
    wanted = _content(tokenizer, word, placeholders)
    if not wanted:
        return []
    present = _layout(tokenizer, prompt, placeholders, require=False, warn=False)
    found: set[int] = set()
    for start in range(1, len(present) - len(wanted) + 1):
        stop = start + len(wanted)
        if present[start:stop] == wanted and _ends_a_word(tokenizer, present[start - 1]):
            found.update(range(start, stop))
    return sorted(found)


def readable(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return what tokens say, a space after each word and each mark; special tokens left out."""
    special = set(tokenizer.all_special_ids)
    text = tokenizer.decode([i for i in ids if i not in special])
    # A copied tokenizer of transformers 5 leaves the ends of words in.
    return str(text).replace("</w>", " ").strip()


def _layout(
    tokenizer: Any,
    prompt: str,
    placeholders: Sequence[Placeholder],
    require: bool,
    warn: bool = True,
) -> list[_Token]:
    """All positions of one prompt: start of text, content, end of text, padding."""
    length = _length(tokenizer)
    content = _content(tokenizer, prompt, placeholders)
    if require and not any(token.slot for token in content):
        names = " or ".join(repr(placeholder) for placeholder, _ in placeholders)
        raise PromptError(
            f"the prompt {prompt!r} has no placeholder; write {names} where the subject stands"
        )
    room = length - 2
    for position, token in enumerate(content[room:], start=room + 1):
        if token.slot:
            name = _names_by_slot(placeholders)[token.slot - 1]
            raise PromptError(
                f"the placeholder {name!r} is token {position} of the "
                f"prompt {prompt!r}, of which only the first {room} are used; shorten the prompt "
                "or move the placeholder to its front"
            )
    if warn and len(content) > room:
        removed = readable(tokenizer, [token.token_id for token in content[room:]])
        logger.warning(
            "the prompt is cut after %d tokens, the most that the text encoder takes; left out: %s",
            room,
            printable(removed, 300),
        )
    start = _Token(tokenizer.bos_token_id, 0)
    end = _Token(tokenizer.eos_token_id, 0)
    pad = _Token(tokenizer.pad_token_id, 0)
    row = [start, *content[:room], end]
    return row + [pad] * (length - len(row))


def _content(tokenizer: Any, text: str, placeholders: Sequence[Placeholder]) -> list[_Token]:
    text = composed(text)
    slots = itertools.count(1)
    places = [[_Token(token_id, next(slots)) for token_id in ids] for _, ids in placeholders]
    tokens: list[_Token] = []
    last = 0
    names = [check_placeholder(name) for name, _ in placeholders]
    for begin, end, place in _occurrences(text, names):
        tokens += [_Token(token_id, 0) for token_id in read_ids(tokenizer, text[last:begin])]
        tokens += places[place]
        last = end
    return tokens + [_Token(token_id, 0) for token_id in read_ids(tokenizer, text[last:])]


def _names_by_slot(placeholders: Sequence[Placeholder]) -> list[str]:
    return [name for name, ids in placeholders for _ in ids]


def _occurrences(text: str, placeholders: list[str]) -> Iterator[tuple[int, int, int]]:
    """(begin, end, number of the placeholder) wherever one stands in a text, left to right."""
    if not placeholders:
        return
    # The longest first, so that "<me>2" is not read as "<me>" and a rest.
    choices = sorted(placeholders, key=len, reverse=True)
    for match in re.finditer("|".join(_as_word(choice) for choice in choices), text):
        begin, end = match.span()
        before = text[begin - 1 : begin]
        after = text[end : end + 1]
        joins = bool(after) and unicodedata.combining(after) > 0
        if _is_word_character(before) or _is_word_character(after) or joins:
            longer = before + match.group() + after
            raise PromptError(
                f"the placeholder {match.group()!r} runs into a longer word (…{longer}…) in the "
                f"prompt {text!r}; put a space or a punctuation mark between them"
            )
        yield begin, end, placeholders.index(match.group())


def _as_word(placeholder: str) -> str:
    """A pattern for the placeholder.

    One that begins or ends like a word ("sks") is a different word inside another ("sksy"), which
    is no mistake; one in brackets ("<me>ow") is, and is told to the user.
    """
    before = r"(?<!\w)" if _is_word_character(placeholder[0]) else ""
    after = r"(?!\w)" if _is_word_character(placeholder[-1]) else ""
    return before + re.escape(placeholder) + after


def _is_word_character(character: str) -> bool:
    return re.match(r"\w", character) is not None


def _ends_a_word(tokenizer: Any, token: _Token) -> bool:
    if token.slot or token.token_id in tokenizer.all_special_ids:
        return True
    return tokenizer.convert_ids_to_tokens(token.token_id).endswith("</w>")


def read_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens, of any length.

    A call of a fast tokenizer sets its padding and truncation, which other threads may be encoding
    by. This neither sets nor obeys them.
    """
    if not text:
        return []
    if not tokenizer.is_fast:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    # Truncation leaves the rest of the text in `overflowing`, and padding is not attended to.
    parts = [
        [pair for *pair, is_text in zip(e.offsets, e.ids, e.attention_mask, strict=True) if is_text]
        for e in (encoding, *encoding.overflowing)
    ]
    # Truncated on the left, the last part of the text comes first.
    if parts[-1][:1] < parts[0][:1]:
        parts.reverse()
    return [token_id for part in parts for _, token_id in part]


def _length(tokenizer: Any) -> int:
    length = tokenizer.model_max_length
    if not (isinstance(length, int) and 3 <= length <= 4096):
        raise ModelError(
            f"the tokenizer's model_max_length is {length!r}; set it to the number of positions of "
            "the text encoder (77 for CLIP)"
        )
    return length
