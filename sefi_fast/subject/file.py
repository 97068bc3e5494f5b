"""The subject file: one small safetensors file, checked in every part when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sefi_fast.errors import SubjectFileError
from sefi_fast.utils.files import atomic_write

if TYPE_CHECKING:
    from sefi_fast.subject.subject import Subject

FORMAT = "sefi_fast.subject"
FORMAT_VERSION = 2
"""Format 1 had one vector a placeholder and no axis for it."""
SIZE_LIMIT = 100_000
_READ_LIMIT = 16 * 2**20
_TEXTS = ("placeholder", "class_word", "base_model", "library_version")


def write(subject: Subject, path: Path) -> None:
    """Writes the subject's file, whole or not at all."""
    atomic_write(path, _content(subject))


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
        tensors[f"tokens.{number}"] = tokens.cpu().contiguous()
        tensors[f"class_embedding.{number}"] = subject.class_embeddings[number].cpu().contiguous()
    content = _in_order(safetensors.torch.save(tensors, metadata))
    if len(content) > SIZE_LIMIT:
        halves = {name: _to_half(tensor) for name, tensor in tensors.items()}
        content = _in_order(safetensors.torch.save(halves, metadata))
    return content


def _in_order(content: bytes) -> bytes:
    """The same file with a sorted header; safetensors shuffles it, one subject must be one file."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(
        json.loads(content[8:start]), sort_keys=True, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[start:]


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
    metadata, tensors = _open(path)
    if metadata.get("format") != FORMAT:
        raise SubjectFileError(
            f"{path} is a safetensors file but holds no subject of sefi_fast; train one with "
            "sefi_fast.train, or load weights of another kind with the pipeline's own loaders"
        )
    version = _number(path, metadata, "format_version")
    if version > FORMAT_VERSION:
        raise SubjectFileError(
            f"{path} has format {version}, written by sefi_fast "
            f"{metadata.get('library_version', 'unknown')}; this one reads up to format "
            f"{FORMAT_VERSION}; update sefi_fast"
        )
    stages = _number(path, metadata, "stages")
    streams = 2 if _value(path, metadata, "split", bool) else 1
    count = _number(path, metadata, "text_encoders")
    vectors = _number(path, metadata, "num_vectors") if version > 1 else 1
    wanted = {f"{kind}.{n}" for n in range(count) for kind in ("tokens", "class_embedding")}
    if count < 1 or set(tensors) != wanted:
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
    return {
        **texts,
        "tokens": [tensors[f"tokens.{n}"].float() for n in range(count)],
        "class_embeddings": [tensors[f"class_embedding.{n}"].float() for n in range(count)],
        "settings": _value(path, metadata, "settings", dict),
        "summary": _value(path, metadata, "summary", dict),
    }


def _open(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise SubjectFileError(f"{path} {what}; wanted the .safetensors file of a subject")
    try:
        size = path.stat().st_size
        if size > _READ_LIMIT:
            raise SubjectFileError(
                f"{path} has {size / 2**20:.0f} MB, a subject has well under one; this is a file "
                "of another kind"
            )
        with safetensors.safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise SubjectFileError(f"{path} cannot be read: {error}") from error
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, SubjectFileError):
            raise
        raise _damaged(path, f"it is no readable safetensors file ({error})") from error
    return metadata, tensors


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


def _number(path: Path, metadata: dict[str, str], name: str) -> int:
    text = _text(path, metadata, name)
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise _damaged(path, f"its {name} is {text!r}, wanted a whole number")
    return int(text)


def _value(path: Path, metadata: dict[str, str], name: str, kind: type) -> Any:
    text = _text(path, metadata, name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its {name} cannot be read as JSON") from error
    if not isinstance(value, kind):
        raise _damaged(path, f"its {name} is {text[:40]!r}, wanted JSON of type {kind.__name__}")
    return value


def _damaged(path: Path, reason: str) -> SubjectFileError:
    return SubjectFileError(f"the subject file {path} is damaged: {reason}; train or copy it again")
