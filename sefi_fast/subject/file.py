"""The subject file: one small safetensors file, checked in every part when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sefi_fast.errors import SubjectFileError
from sefi_fast.limits import MOST_STAGES, MOST_TEXT_ENCODERS, MOST_VECTORS
from sefi_fast.utils.files import atomic_write, read_regular
from sefi_fast.utils.strict_json import parse_json
from sefi_fast.utils.tensor_file import pack_tensors, unpack_tensors

if TYPE_CHECKING:
    from sefi_fast.subject.subject import Subject

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
    """Steps, seconds and the mean loss and alignment of the last tenth of a training history."""
    loss = list(getattr(history, "loss", None) or [])
    if not loss:
        return {}
    tail = max(1, len(loss) // 10)
    summary: dict[str, Any] = {"steps": len(loss)}
    for name in ("loss", "alignment"):
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
