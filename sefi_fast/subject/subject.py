"""A trained subject and its safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sefi_fast import __version__
from sefi_fast.errors import PromptError, SubjectFileError, printable
from sefi_fast.prompts.text_encoder import token_table
from sefi_fast.prompts.tokenization import Placeholder, class_token_ids, padded
from sefi_fast.utils.files import (
    MOST_STAGES,
    MOST_TEXT_ENCODERS,
    MOST_VECTORS,
    atomic_write,
    read_regular,
    user_path,
)
from sefi_fast.utils.strict_json import parse_json
from sefi_fast.utils.tensor_file import pack_tensors, unpack_tensors
from sefi_fast.utils.text import check_placeholder, composed

FORMAT = "sefi_fast.subject"
FORMAT_VERSION = "1"
SIZE_LIMIT = 100_000
"""Bytes of a subject file in float32; a larger subject is saved in float16."""
LEAST_SIMILARITY = 0.9
_READ_LIMIT = 64 * 2**20
_TEXTS = ("placeholder", "class_word", "base_model", "library_version")


@dataclass(eq=False)
class Subject:
    """Result of training: 2·S·W tokens for each text encoder (docs/method.md §1).

    Attributes:
        placeholder: the word for the subject in prompts, such as "<me>".
        class_word: the general word for the subject, of one token or several.
        tokens: one [S, 2, W, C] for each text encoder (axis 1: K row, V row; the placeholder has W
            tokens), or [S, 1, W, C] if one row serves both streams; [S, 2, C] is taken as W = 1.
            Kept as a float32 copy on the CPU.
        class_embeddings: one [n, C] for each text encoder, the base model's rows of the class
            word's n tokens, at most W; [C] is taken as n = 1. Kept like `tokens`.
        base_model: name or folder of the model it was trained on.
        settings: settings of the training (anything that JSON can hold).
        library_version: version of sefi_fast that trained it.
        history: record of the training; not kept in the file.
        summary: the history in brief, kept in the file.

    Raises:
        ValueError: the parts do not fit together, hold NaN or infinity, or have more than 100
            stages, 75 vectors or 4 text encoders; or the placeholder is not one word, which is
            checked again when it is set.

    Example:
        >>> subject = Subject.load("me.safetensors")  # doctest: +SKIP
        >>> subject.placeholder = "<rex>"  # doctest: +SKIP
        >>> subject.save("rex.safetensors")  # doctest: +SKIP
    """

    placeholder: str
    class_word: str
    tokens: list[Tensor]
    class_embeddings: list[Tensor]
    base_model: str
    settings: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    history: Any = None
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.class_word.strip():
            raise ValueError("class_word is empty; name what the subject is (person, cat, toy)")
        self.tokens = [_own_copy(tokens, 4) for tokens in self.tokens]
        self.class_embeddings = [_own_copy(rows, 2) for rows in self.class_embeddings]
        counts = (len(self.tokens), len(self.class_embeddings))
        if counts[0] != counts[1] or not 1 <= counts[0] <= MOST_TEXT_ENCODERS:
            raise ValueError(
                f"a subject needs tokens and a class embedding for each text encoder, of 1 to "
                f"{MOST_TEXT_ENCODERS}, got {counts[0]} and {counts[1]}"
            )
        first = self.tokens[0].shape[:3]
        for tokens, rows in zip(self.tokens, self.class_embeddings, strict=True):
            shape = tuple(tokens.shape)
            fits = len(shape) == 4 and shape[1] in (1, 2) and shape[:3] == first
            if not fits or 0 in shape:
                raise ValueError(
                    "tokens must be [stages, 2, vectors, C], or [stages, 1, vectors, C], alike for "
                    f"all text encoders, got {[tuple(t.shape) for t in self.tokens]}"
                )
            if shape[0] > MOST_STAGES or shape[2] > MOST_VECTORS:
                raise ValueError(
                    f"a subject has at most {MOST_STAGES} stages and {MOST_VECTORS} vectors, got "
                    f"tokens of shape {shape}"
                )
            if rows.ndim != 2 or rows.shape[1] != shape[3] or not 1 <= len(rows) <= shape[2]:
                raise ValueError(
                    f"a class embedding of shape {tuple(rows.shape)} does not fit tokens of shape "
                    f"{shape}"
                )
            for name, values in (("tokens", tokens), ("class embedding", rows)):
                if not bool(torch.isfinite(values).all()):
                    raise ValueError(f"the {name} of {self.placeholder!r} hold NaN or infinity")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "placeholder":
            value = check_placeholder(value)
        elif name == "class_word":
            value = composed(value)
        elif name == "base_model":
            # The name of a folder may hold bytes that no text has, and the file keeps text.
            value = printable(value)
        super().__setattr__(name, value)

    @property
    def stages(self) -> int:
        """Number of stages S."""
        return self.tokens[0].shape[0]

    @property
    def split(self) -> bool:
        """Whether K and V have separate rows."""
        return self.tokens[0].shape[1] == 2

    @property
    def num_vectors(self) -> int:
        """Number of tokens W of the placeholder in a prompt."""
        return self.tokens[0].shape[2]

    def in_prompts(self, tokenizer: Any) -> Placeholder:
        """Return the placeholder and the class word's ids, as `tokenize_prompts` takes them.

        Raises:
            PromptError: the tokenizer does not know the class word, or cuts it into more tokens
                than the subject has.
        """
        ids = class_token_ids(tokenizer, self.class_word)
        return self.placeholder, padded(ids, self.num_vectors, self.class_word)

    def __repr__(self) -> str:
        kind = "K and V" if self.split else "tied"
        several = f" of {self.num_vectors} vectors" if self.num_vectors > 1 else ""
        return printable(
            f"Subject({self.placeholder!r}, a {self.class_word}, {self.stages} stages {kind}"
            f"{several}, trained on {self.base_model!r})"
        )

    def save(self, path: str | Path) -> None:
        """Write the subject to one safetensors file, whole or not at all.

        The numbers are float32 up to a file of 100 KB (Stable Diffusion 1.x at S = 5: 34 KB) and
        rounded to float16 beyond (10 stages for two text encoders: 87 KB).

        Raises:
            OSError: the file cannot be written.
            ValueError: the settings hold something that JSON cannot, or `load` would refuse the
                file.
        """
        path = user_path(path)
        content = _content(self)
        try:
            _parse(content, path)
        except SubjectFileError as error:
            raise ValueError(
                f"the subject is not saved, because it could not be loaded: {error}"
            ) from error
        atomic_write(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Subject:
        """Read a subject from a file that `save` wrote.

        Raises:
            SubjectFileError: the file is missing, damaged, of another kind or from a newer version.
        """
        path = user_path(path)
        return _parse(read_tensor_file(path, "a subject"), path)

    def check_fits(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> None:
        """Check that the subject was trained for text encoders like these.

        The class word's embedding rows are compared with those at the start of training. A
        fine-tuned model is close to its base (cosine similarity at least 0.9), other families are
        not.

        Raises:
            SubjectFileError: it was not; the message names the model it was trained on.
        """
        trained_on = f"the subject {self.placeholder!r} was trained on {self.base_model!r}"
        if not len(tokenizers) == len(text_encoders) == len(self.tokens):
            raise SubjectFileError(
                f"{trained_on} with {len(self.tokens)} text encoder(s), this pipeline has "
                f"{len(text_encoders)}; use it with a model of the same family"
            )
        for tokenizer, text_encoder, rows in zip(
            tokenizers, text_encoders, self.class_embeddings, strict=True
        ):
            table = token_table(text_encoder)
            if table.embedding_dim != rows.shape[1]:
                raise SubjectFileError(
                    f"{trained_on}, whose text encoder is {rows.shape[1]} wide; this pipeline's is "
                    f"{table.embedding_dim} wide; use it with a model of the same family"
                )
            try:
                class_ids = class_token_ids(tokenizer, self.class_word)
            except PromptError:
                class_ids = []
            if len(class_ids) != len(rows):
                count = "one token" if len(rows) == 1 else f"{len(rows)} tokens"
                raise SubjectFileError(
                    f"{trained_on}, where {self.class_word!r} is {count}; in this pipeline it is "
                    "not; use it with a model of the same family"
                )
            found = embedding_rows(text_encoder, class_ids)
            similarity = torch.cosine_similarity(found, rows, dim=1).min().item()
            if not similarity >= LEAST_SIMILARITY:
                raise SubjectFileError(
                    f"{trained_on}. The embedding of {self.class_word!r} in this pipeline differs "
                    f"from that one (cosine similarity {similarity:.2f}, required "
                    f"{LEAST_SIMILARITY}). Use that model or a fine-tuned version of it"
                )


def _own_copy(values: Tensor, rank: int) -> Tensor:
    """Return a copy, which training does not change, with the axis of one vector if it lacks it."""
    values = values.detach().to("cpu", torch.float32, copy=True)
    return values.unsqueeze(-2) if values.ndim == rank - 1 else values


def embedding_rows(text_encoder: Any, token_ids: Sequence[int]) -> Tensor:
    """Return float32 rows [n, C] of a text encoder's token table, on the CPU."""
    # Called, not read from its weight: offloading keeps an empty weight until the module runs.
    table = token_table(text_encoder)
    device = next(table.parameters()).device
    index = torch.tensor(token_ids, device="cpu" if device.type == "meta" else device)
    with torch.no_grad():
        return cast(Tensor, table(index)).float().cpu()


def summarise(history: Any) -> dict[str, Any]:
    """Summarise a history: steps, seconds, mean loss and subject loss of its last tenth."""
    if history is None or not history.loss:
        return {}
    steps = len(history.loss)
    summary: dict[str, Any] = {"steps": steps}
    for name in ("loss", "subject_loss"):
        values = getattr(history, name)[-max(1, steps // 10) :]
        if values and math.isfinite(mean := sum(values) / len(values)):
            summary[f"final_{name}"] = round(mean, 6)
    if history.seconds:
        summary["seconds"] = round(history.seconds[-1], 3)
    return summary


def read_tensor_file(path: Path, kind: str) -> bytes:
    """Return the content of a .safetensors file of a subject or an embedding.

    Raises:
        SubjectFileError: the file cannot be read.
    """
    try:
        return read_regular(path, _READ_LIMIT)
    except OSError as error:
        raise SubjectFileError(
            f"{path} cannot be read: {error.strerror or error}. Give the .safetensors file of "
            f"{kind}"
        ) from error


def _content(subject: Subject) -> bytes:
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **_counts(subject),
        **{name: getattr(subject, name) for name in _TEXTS},
    }
    summary = summarise(subject.history) or subject.summary
    for name, value in (("settings", subject.settings), ("summary", summary)):
        try:
            metadata[name] = json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the subject's {name} cannot be kept as JSON: {error}") from error
    parts = {"tokens": subject.tokens, "class_embedding": subject.class_embeddings}
    tensors = {f"{name}.{n}": x for name, each in parts.items() for n, x in enumerate(each)}
    content = pack_tensors(tensors, metadata)
    if len(content) <= SIZE_LIMIT:
        return content
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    if not all(bool(torch.isfinite(half).all()) for half in halves.values()):
        largest = max(tensor.abs().max().item() for tensor in tensors.values())
        raise ValueError(
            f"the tokens reach {largest:.3g}, beyond float16, in which so many are kept; train "
            "with fewer stages or a lower learning rate"
        )
    return pack_tensors(halves, metadata)


def _counts(subject: Subject) -> dict[str, str]:
    """Return the metadata that repeats the shapes of the tensors for other readers."""
    return {
        "stages": str(subject.stages),
        "split": json.dumps(subject.split),
        "num_vectors": str(subject.num_vectors),
        "text_encoders": str(len(subject.tokens)),
    }


def _parse(content: bytes, path: Path) -> Subject:
    try:
        metadata, tensors = unpack_tensors(content)
    except ValueError as error:
        raise _damaged(path, f"it is not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise SubjectFileError(
            f"{path} is a safetensors file, but not of a subject of sefi_fast. Train a subject "
            "with sefi_fast.train, or load other weights with the pipeline's own loaders"
        )
    if (version := _text(path, metadata, "format_version")) != FORMAT_VERSION:
        raise SubjectFileError(
            f"{path} has format_version {version[:20]!r}, written by sefi_fast "
            f"{metadata.get('library_version', 'unknown')}. This sefi_fast reads format "
            f"{FORMAT_VERSION}. Update sefi_fast"
        )
    numbers = range(len(tensors) // 2)
    wanted = {f"{kind}.{n}" for n in numbers for kind in ("tokens", "class_embedding")}
    if set(tensors) != wanted:
        raise _damaged(path, f"it holds {sorted(tensors)}, wanted {sorted(wanted)}")
    for name, tensor in tensors.items():
        rank = 4 if name.startswith("tokens") else 2
        if tensor.dtype not in (torch.float32, torch.float16) or tensor.ndim != rank:
            raise _damaged(
                path,
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}, wanted float32 or "
                f"float16 with {rank} axes",
            )
    texts = {name: _text(path, metadata, name) for name in _TEXTS}
    values: dict[str, dict[str, Any]] = {}
    for name in ("settings", "summary"):
        text = _text(path, metadata, name)
        try:
            values[name] = parse_json(text)
        except ValueError as error:
            raise _damaged(path, f"its {name} cannot be read as JSON ({error})") from error
        if not isinstance(values[name], dict):
            raise _damaged(path, f"its {name} is not a JSON object")
    try:
        subject = Subject(
            **texts,
            tokens=[tensors[f"tokens.{n}"] for n in numbers],
            class_embeddings=[tensors[f"class_embedding.{n}"] for n in numbers],
            settings=values["settings"],
            summary=values["summary"],
        )
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    for name, count in _counts(subject).items():
        if (found := _text(path, metadata, name)) != count:
            raise _damaged(path, f"its {name} is {found[:40]!r}, but its tensors have {count}")
    return subject


def _text(path: Path, metadata: dict[str, str], name: str) -> str:
    if name not in metadata:
        raise _damaged(path, f"its {name} is missing")
    return metadata[name]


def _damaged(path: Path, reason: str) -> SubjectFileError:
    return SubjectFileError(f"the subject file {path} is damaged: {reason}; train or copy it again")
