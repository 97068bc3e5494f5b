"""A trained subject and its safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sefi_fast import __version__
from sefi_fast.errors import PromptError, SubjectFileError
from sefi_fast.prompts.text_encoder import token_table
from sefi_fast.prompts.tokenization import Placeholder, class_token_ids, padded
from sefi_fast.utils.files import atomic_write, read_regular, user_path
from sefi_fast.utils.limits import MOST_STAGES, MOST_TEXT_ENCODERS, MOST_VECTORS
from sefi_fast.utils.strict_json import parse_json
from sefi_fast.utils.tensor_file import pack_tensors, unpack_tensors
from sefi_fast.utils.text import printable
from sefi_fast.utils.words import check_placeholder, composed

if TYPE_CHECKING:
    pass


FORMAT = "sefi_fast.subject"
FORMAT_VERSION = 2
"""Format 1 had one vector a placeholder and no axis for it."""
SIZE_LIMIT = 100_000
_READ_LIMIT = 64 * 2**20
_TEXTS = ("placeholder", "class_word", "base_model", "library_version")


def write(subject: Subject, path: Path) -> None:
    """Write the subject's file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
        ValueError: `read` would refuse the file.
    """
    content = _content(subject)
    try:
        _parse(content, path)
    except SubjectFileError as error:
        raise ValueError(f"the subject is not saved, as it could not be loaded: {error}") from error
    atomic_write(path, content)


def _content(subject: Subject) -> bytes:
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "stages": str(subject.stages),
        "split": json.dumps(subject.split),
        "num_vectors": str(subject.num_vectors),
        "text_encoders": str(len(subject.tokens)),
        "settings": _json("settings", subject.settings),
        "summary": _json("summary", summarise(subject.history) or subject.summary),
    }
    metadata.update({name: getattr(subject, name) for name in _TEXTS})
    tensors = {}
    for number, tokens in enumerate(subject.tokens):
        tensors[f"tokens.{number}"] = tokens
        tensors[f"class_embedding.{number}"] = subject.class_embeddings[number]
    content = pack_tensors(tensors, metadata)
    if len(content) > SIZE_LIMIT:
        halves = {name: _to_half(tensor) for name, tensor in tensors.items()}
        content = pack_tensors(halves, metadata)
    return content


def _to_half(tensor: Tensor) -> Tensor:
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(
            f"the tokens reach {tensor.abs().max().item():.3g}, beyond float16, in which so many "
            "are kept; train with fewer stages or a lower learning rate"
        )
    return half


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the subject's {name} cannot be kept as JSON: {error}") from error


def summarise(history: Any) -> dict[str, Any]:
    """Steps, seconds and the mean loss and subject loss of the last tenth of a training history."""
    loss = list(getattr(history, "loss", None) or [])
    if not loss:
        return {}
    tail = max(1, len(loss) // 10)
    summary: dict[str, Any] = {"steps": len(loss)}
    for name in ("loss", "subject_loss"):
        values = [float(value) for value in list(getattr(history, name, None) or [])[-tail:]]
        mean = sum(values) / len(values) if values else float("nan")
        if mean - mean == 0:
            summary[f"final_{name}"] = round(mean, 6)
    seconds = list(getattr(history, "seconds", None) or [])
    if seconds:
        summary["seconds"] = round(float(seconds[-1]), 3)
    return summary


def read(path: Path) -> dict[str, Any]:
    """The arguments of ``Subject`` from a file.

    Raises:
        SubjectFileError: for anything that is not a whole and sound subject file.
    """
    wanted = "wanted the .safetensors file of a subject"
    try:
        content = read_regular(path, _READ_LIMIT)
    except FileNotFoundError as error:
        raise SubjectFileError(f"{path} does not exist; {wanted}") from error
    except OSError as error:
        raise SubjectFileError(
            f"{path} cannot be read: {error.strerror or error}; {wanted}"
        ) from error
    return _parse(content, path)


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        metadata, tensors = unpack_tensors(content)
    except ValueError as error:
        raise _damaged(path, f"it is no readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise SubjectFileError(
            f"{path} is a safetensors file but holds no subject of sefi_fast; train one with "
            "sefi_fast.train, or load weights of another kind with the pipeline's own loaders"
        )
    version = _number(path, metadata, "format_version", 999_999)
    if version > FORMAT_VERSION:
        raise SubjectFileError(
            f"{path} has format {version}, written by sefi_fast "
            f"{metadata.get('library_version', 'unknown')}; this one reads up to format "
            f"{FORMAT_VERSION}; update sefi_fast"
        )
    stages = _number(path, metadata, "stages", MOST_STAGES)
    streams = 2 if _value(path, metadata, "split", bool) else 1
    count = _number(path, metadata, "text_encoders", MOST_TEXT_ENCODERS)
    vectors = _number(path, metadata, "num_vectors", MOST_VECTORS) if version > 1 else 1
    wanted = {f"{kind}.{n}" for n in range(count) for kind in ("tokens", "class_embedding")}
    if set(tensors) != wanted:
        raise _damaged(path, f"it holds {sorted(tensors)}, wanted {sorted(wanted)}")
    if version == 1:
        tensors = {name: x.unsqueeze(-2) if x.ndim else x for name, x in tensors.items()}
    for name, tensor in tensors.items():
        leading = (stages, streams, vectors) if name.startswith("tokens") else (None,)
        _check_tensor(path, name, tensor, leading)
    for n in range(count):
        if tensors[f"tokens.{n}"].shape[-1] != tensors[f"class_embedding.{n}"].shape[-1]:
            raise _damaged(path, f"tokens and class embedding {n} differ in width")
        if len(tensors[f"class_embedding.{n}"]) > vectors:
            raise _damaged(path, f"its class word has more than {vectors} tokens")
    texts = {name: _text(path, metadata, name) for name in _TEXTS}
    if texts["placeholder"].split() != [texts["placeholder"]] or not texts["class_word"].strip():
        raise _damaged(path, "its placeholder or its class word is no word")
    settings = _value(path, metadata, "settings", dict)
    if not isinstance(settings.get("model"), (str, type(None))):
        raise _damaged(path, "the model in its settings is not text")
    return {
        **texts,
        "tokens": [tensors[f"tokens.{n}"].float() for n in range(count)],
        "class_embeddings": [tensors[f"class_embedding.{n}"].float() for n in range(count)],
        "settings": settings,
        "summary": _value(path, metadata, "summary", dict),
    }


def _check_tensor(path: Path, name: str, tensor: Tensor, leading: tuple[int | None, ...]) -> None:
    """Raises unless the tensor is [*leading, C], None standing for any number."""
    if tensor.dtype not in (torch.float32, torch.float16):
        raise _damaged(path, f"{name} is {tensor.dtype}, wanted float32 or float16")
    fits = tensor.dim() == len(leading) + 1 and all(
        wanted in (None, found) for wanted, found in zip(leading, tensor.shape, strict=False)
    )
    if not fits or not tensor.numel():
        shape = ", ".join("n" if size is None else str(size) for size in (*leading, "C"))
        raise _damaged(path, f"{name} has shape {list(tensor.shape)}, wanted [{shape}]")
    if not bool(torch.isfinite(tensor).all()):
        raise _damaged(path, f"{name} holds NaN or infinity")


def _text(path: Path, metadata: dict[str, str], name: str) -> str:
    if name not in metadata:
        raise _damaged(path, f"its {name} is missing")
    return metadata[name]


def _number(path: Path, metadata: dict[str, str], name: str, most: int) -> int:
    text = _text(path, metadata, name)
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else 0
    if not 1 <= number <= most:
        raise _damaged(path, f"its {name} is {text[:40]!r}, wanted a whole number from 1 to {most}")
    return number


def _value(path: Path, metadata: dict[str, str], name: str, kind: type) -> Any:
    text = _text(path, metadata, name)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise _damaged(path, f"its {name} cannot be read as JSON ({error})") from error
    if not isinstance(value, kind):
        raise _damaged(path, f"its {name} is {text[:40]!r}, wanted JSON of type {kind.__name__}")
    return value


def _damaged(path: Path, reason: str) -> SubjectFileError:
    return SubjectFileError(f"the subject file {path} is damaged: {reason}; train or copy it again")


LEAST_SIMILARITY = 0.9


@dataclass(eq=False)
class Subject:
    """What training leaves behind: 2·S·W tokens for each text encoder (docs/method.md §1).

    Attributes:
        placeholder: the word that stands for the subject in prompts, such as "<me>".
        class_word: the general word that anchors it, one token or several.
        tokens: one [S, 2, W, C] for each text encoder (axis 1: K row, V row; W tokens stand for the
            placeholder), or [S, 1, W, C] if one row serves both streams; [S, 2, C] is taken as
            W = 1. Kept as a float32 copy on the CPU.
        class_embeddings: one [n, C] for each text encoder, the base model's rows of the class
            word's n tokens, at most W; [C] is taken as n = 1. Likewise.
        base_model: name or folder of the model it was trained on.
        settings: the training's settings (anything that JSON can hold).
        library_version: version of sefi_fast that trained it.
        history: what training saw; not kept in the file.
        summary: the history in brief, kept in the file.

    Raises:
        ValueError: on making one whose parts do not fit together, hold NaN or infinity, or are more
            than `sefi_fast.utils.limits` allows; on setting a placeholder that is not one word.
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
        # Copies, so that training that goes on does not change a subject already taken from it.
        self.tokens = [_with_axis(_own_copy(tokens), 4) for tokens in self.tokens]
        self.class_embeddings = [_with_axis(_own_copy(rows), 2) for rows in self.class_embeddings]
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
            if not fits or 0 in shape[:3]:
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
            # A folder's name may hold bytes that no text has, and the file keeps text.
            value = printable(value)
        super().__setattr__(name, value)

    @property
    def stages(self) -> int:
        """Number of stages S."""
        return self.tokens[0].shape[0]

    @property
    def split(self) -> bool:
        """Whether K and V have rows of their own."""
        return self.tokens[0].shape[1] == 2

    @property
    def num_vectors(self) -> int:
        """Number of tokens W that stand for the placeholder in a sentence."""
        return self.tokens[0].shape[2]

    def in_prompts(self, tokenizer: Any) -> Placeholder:
        """The placeholder and the class word's ids in its place, as `tokenize_prompts` takes them.

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
        """Writes the subject to one safetensors file, whole or not at all.

        The numbers are float32 up to a file of 100 KB (Stable Diffusion 1.x at S = 5: 34 KB) and
        rounded to float16 beyond (10 stages for two text encoders: 87 KB; four vectors at S = 5:
        65 KB).

        Raises:
            OSError: the file cannot be written.
            ValueError: the settings hold something that JSON cannot, or `load` would refuse the
                file.
        """
        write(self, user_path(path))

    @classmethod
    def load(cls, path: str | Path) -> Subject:
        """Reads a subject from the file that ``save`` wrote.

        Raises:
            SubjectFileError: the file is missing, damaged, of another kind or from a newer version.
        """
        return cls(**read(user_path(path)))

    def check_fits(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> None:
        """Checks that the subject was made for text encoders like these.

        The class word's embedding rows are compared with those the subject was trained from: a
        fine-tuned model is close to its base (cosine at least 0.9), another family is not.

        Raises:
            SubjectFileError: it was not; the message names the model it was trained on.
        """
        made_for = f"the subject {self.placeholder!r} was trained on {self.base_model!r}"
        if not len(tokenizers) == len(text_encoders) == len(self.tokens):
            raise SubjectFileError(
                f"{made_for} with {len(self.tokens)} text encoder(s), this pipeline has "
                f"{len(text_encoders)}; use it with a model of the same family"
            )
        for number, (tokenizer, text_encoder) in enumerate(
            zip(tokenizers, text_encoders, strict=True)
        ):
            own = self.class_embeddings[number]
            table = token_table(text_encoder)
            if table.embedding_dim != own.shape[1]:
                raise SubjectFileError(
                    f"{made_for}, whose text encoder is {own.shape[1]} wide; this pipeline's is "
                    f"{table.embedding_dim} wide; use it with a model of the same family"
                )
            try:
                class_ids = class_token_ids(tokenizer, self.class_word)
            except PromptError:
                class_ids = []
            if len(class_ids) != len(own):
                raise SubjectFileError(
                    f"{made_for}, where {self.class_word!r} is {_tokens(len(own))}; in this "
                    "pipeline it is not; use it with a model of the same family"
                )
            rows = _table_rows(table, class_ids)
            similarity = torch.cosine_similarity(rows, own, dim=1).min().item()
            if not similarity >= LEAST_SIMILARITY:
                raise SubjectFileError(
                    f"{made_for}; this pipeline's embedding of {self.class_word!r} is another "
                    f"(cosine similarity {similarity:.2f}, needed {LEAST_SIMILARITY}); use it "
                    "with that model or a fine-tuned version of it"
                )


def _own_copy(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32, copy=True)


def _with_axis(values: Tensor, rank: int) -> Tensor:
    """With an axis of one before the last if it lacks one to `rank`."""
    return values.unsqueeze(-2) if values.ndim == rank - 1 else values


def _tokens(count: int) -> str:
    return "one token" if count == 1 else f"{count} tokens"


def _table_rows(table: nn.Module, token_ids: Sequence[int]) -> Tensor:
    # Called, not read from its weight: offloading keeps an empty weight until the module runs.
    device = next(table.parameters()).device
    index = torch.tensor(token_ids, device="cpu" if device.type == "meta" else device)
    with torch.no_grad():
        return table(index).float().cpu()
