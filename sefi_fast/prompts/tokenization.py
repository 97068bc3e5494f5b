"""Tokenise prompts with placeholders of subjects, and find placeholders in text and tokens."""

from __future__ import annotations

import itertools
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from sefi_fast.errors import ModelError, PromptError, printable
from sefi_fast.utils.text import check_placeholder, composed

logger = logging.getLogger(__name__)

Placeholder = tuple[str, Sequence[int]]
"""A placeholder, and the class word's token ids that replace it in a sentence."""

_MOST_CLASS_TOKENS = 8
_CLASS_WORDS = ("person", "dog", "toy", "creature")
_LOOKS_LIKE_A_PLACEHOLDER = re.compile(r"<[^\s<>]+>")


class PromptTokens(NamedTuple):
    """Token ids of P prompts of M positions, and the subjects' slots among them.

    input_ids: int64 [P, M], with the class word's ids in place of a placeholder. The ids alone
        are the reference prompt.
    slots: int64 [P, M], 0 for the token table's own row and k for the k-th row (counted from 1) of
        the placeholders, those of the first one before those of the second.
    """

    input_ids: Tensor
    slots: Tensor


class _Token(NamedTuple):
    token_id: int
    slot: int


def class_token_ids(tokenizer: Any, class_word: str) -> list[int]:
    """Return the token ids of a class word, one a word: two for "golden retriever".

    Raises:
        PromptError: the tokenizer does not know one of its words, or cuts it into pieces; or there
            are more than 8.
    """
    ids = read_ids(tokenizer, class_word)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    added, vocabulary = tokenizer.get_added_vocab(), tokenizer.get_vocab()
    # The bundled model's tokenizer knows few words.
    examples = ", ".join(word for word in _CLASS_WORDS if f"{word}</w>" in vocabulary)
    if not ids or tokenizer.unk_token_id in ids:
        fault = "is a word that the tokenizer does not know"
    elif any(not piece.endswith("</w>") and piece not in added for piece in pieces):
        fault = f"falls into pieces ({len(pieces)} tokens)"
    elif len(ids) > _MOST_CLASS_TOKENS:
        fault = f"is {len(ids)} tokens; at most {_MOST_CLASS_TOKENS} are possible"
    else:
        return ids
    raise PromptError(
        f"the class word {class_word!r} {fault}. Choose words that are one token each, such as the "
        f"general word for it ({examples})."
    )


def with_all_vectors(pipe: Any, prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """Return the prompts with all vectors of the embeddings that diffusers loaded, numbered."""
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
    """Return the class word's token ids that replace a placeholder, for each tokenizer.

    Args:
        tokenizers: of the pipeline.
        class_word: one token or several.
        num_vectors: number of tokens of the placeholder; default: as many as the class word has.
            If the class word has fewer, its last one is repeated.

    Raises:
        PromptError: a tokenizer does not know the class word, or it has more than `num_vectors`
            tokens; the message names the tokenizer.
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
    """Return the ids of a class word, the last one repeated up to `count`."""
    if len(ids) > count:
        raise PromptError(
            f"the class word {class_word!r} is {len(ids)} tokens, more than the {count} of the "
            "subject (num_vectors). Use more, or a class word of fewer tokens."
        )
    return [*ids, *[ids[-1]] * (count - len(ids))]


def tokenize_prompts(
    tokenizer: Any,
    prompts: Sequence[str],
    placeholders: Sequence[Placeholder],
    *,
    require: bool = False,
) -> PromptTokens:
    """Return token ids and slots of prompts, padded to ``tokenizer.model_max_length``.

    The text on either side of a placeholder is tokenised by itself. CLIP's tokenizer never lets a
    token cross a word boundary, so this equals the whole sentence with the class word in place of
    the placeholder. (It also keeps the class word whole where the sentence would not: ``'dog'`` in
    quotes begins with the contraction ``'d``.)
    A prompt that is too long is cut as diffusers cuts it, with a warning.

    Args:
        tokenizer: a CLIPTokenizer or CLIPTokenizerFast.
        prompts: P sentences.
        placeholders: each with the class word's ids that replace it in the reference prompt, as
            many as the placeholder has tokens; the order gives the slot numbers. A placeholder
            counts as written, and not inside a longer word.
        require: refuse prompts without any of the placeholders.

    Raises:
        PromptError: a placeholder runs into a longer word, lies in the part that is cut off, or
            (require) is missing.
        TypeError: prompts are not a sequence of strings.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts must be a sequence of strings; put a single prompt into a list")
    rows = [_layout(tokenizer, prompt, placeholders, require) for prompt in prompts]
    shape = (len(rows), _length(tokenizer), 2)
    input_ids, slots = torch.tensor(rows, dtype=torch.int64).view(shape).unbind(2)
    return PromptTokens(input_ids.contiguous(), slots.contiguous())


def word_positions(
    tokenizer: Any, prompt: str, word: str, placeholders: Sequence[Placeholder] = ()
) -> list[int]:
    """Return the token positions of each occurrence of a word, phrase or placeholder in a prompt.

    Positions count the start-of-text token. A word of several tokens gives all of them; a class
    word is not found in place of a placeholder. The list is empty if the word is absent or cut off.
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


def unknown_placeholders(
    texts: Iterable[str], placeholders: Iterable[str], tokenizers: Iterable[Any]
) -> list[str]:
    """Return the words in angle brackets that text encoders would read as meaningless pieces.

    Tokenizers may know words of their own, such as embeddings that diffusers loaded.
    """
    own = sorted(placeholders, key=len, reverse=True)
    known = {composed(word) for tokenizer in tokenizers for word in tokenizer.get_added_vocab()}
    found: list[str] = []
    for text in map(composed, texts):
        for placeholder in own:
            text = text.replace(placeholder, " ")
        found += _LOOKS_LIKE_A_PLACEHOLDER.findall(text)
    return [word for word in dict.fromkeys(found) if word not in known]


class PlainPlaceholder:
    """Find a placeholder that was tokenised as plain words.

    Token ids are compared first: those of the placeholder's letters and digits, which are the same
    next to any other character. Only a row that has them is decoded.
    """

    def __init__(self, tokenizer: Any, placeholder: str) -> None:
        self._tokenizer = tokenizer
        alone = read_ids(tokenizer, placeholder)
        # In quotes a letter may become part of a contraction ('s, 'd).
        in_quotes = read_ids(tokenizer, f"'{placeholder}'")
        pieces = zip(alone, tokenizer.convert_ids_to_tokens(alone), strict=True)
        letters = (i for i, piece in pieces if re.fullmatch("[A-Za-z0-9]+(</w>)?", piece))
        self._ids = set(letters) & set(in_quotes)
        written = _readable(tokenizer, alone).replace(" ", "")
        self._pattern = re.compile(_as_word(written, r"\s*"))

    def text_with_it(self, ids: Sequence[int]) -> str | None:
        """Return the text of a prompt's token ids if the placeholder is in it, else None."""
        if not self._ids.issubset(ids):
            return None
        text = _readable(self._tokenizer, ids)
        return text if self._pattern.search(text) else None


def _readable(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens without special ones, a space after each word and each mark."""
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
    length = _length(tokenizer)
    content = _content(tokenizer, prompt, placeholders)
    if require and not any(token.slot for token in content):
        names = " or ".join(repr(placeholder) for placeholder, _ in placeholders)
        raise PromptError(
            f"the prompt {prompt!r} has no placeholder. Write {names} where the subject belongs."
        )
    room = length - 2
    for position, token in enumerate(content[room:], start=room + 1):
        if token.slot:
            name = [name for name, ids in placeholders for _ in ids][token.slot - 1]
            raise PromptError(
                f"the placeholder {name!r} is token {position} of the prompt {prompt!r}, of which "
                f"only the first {room} are used. Shorten the prompt or move the placeholder to "
                "its front."
            )
    if warn and len(content) > room:
        removed = _readable(tokenizer, [token.token_id for token in content[room:]])
        logger.warning(
            "the prompt is cut after %d tokens, the most that the text encoder takes; left out: %s",
            room,
            printable(removed, 300),
        )
    row = [_Token(tokenizer.bos_token_id, 0), *content[:room], _Token(tokenizer.eos_token_id, 0)]
    return row + [_Token(tokenizer.pad_token_id, 0)] * (length - len(row))


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


def _occurrences(text: str, placeholders: list[str]) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, number of the placeholder) of each occurrence, left to right."""
    if not placeholders:
        return
    # The longest first, so that "<me>2" is not read as "<me>" and a rest.
    choices = sorted(placeholders, key=len, reverse=True)
    for match in re.finditer("|".join(_as_word(choice) for choice in choices), text):
        begin, end = match.span()
        before, after = text[begin - 1 : begin], text[end : end + 1]
        joins = bool(after) and unicodedata.combining(after) > 0
        if _is_word_character(before) or _is_word_character(after) or joins:
            longer = before + match.group() + after
            raise PromptError(
                f"the placeholder {match.group()!r} runs into a longer word (…{longer}…) in the "
                f"prompt {text!r}. Put a space or a punctuation mark between them."
            )
        yield begin, end, placeholders.index(match.group())


def _as_word(placeholder: str, between: str = "") -> str:
    """Return a pattern for the placeholder, with the pattern `between` between its characters."""
    # "sks" is not in "sksy", which is not an error; "<me>ow" is an error of the user.
    before = r"(?<!\w)" if _is_word_character(placeholder[:1]) else ""
    after = r"(?!\w)" if _is_word_character(placeholder[-1:]) else ""
    return before + between.join(map(re.escape, placeholder)) + after


def _is_word_character(character: str) -> bool:
    return re.match(r"\w", character) is not None


def _ends_a_word(tokenizer: Any, token: _Token) -> bool:
    if token.slot or token.token_id in tokenizer.all_special_ids:
        return True
    return bool(tokenizer.convert_ids_to_tokens(token.token_id).endswith("</w>"))


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
            f"the tokenizer's model_max_length is {length!r}. Set it to the number of positions of "
            "the text encoder (77 for CLIP)."
        )
    return length
