"""Textual Inversion files: subjects for other programs, and other programs' embeddings as subjects.

A Textual Inversion file of one text encoder holds one tensor [W, C] under the word's name, which
diffusers' `load_textual_inversion`, A1111 and ComfyUI all read; one of SDXL holds `clip_l` and
`clip_g`. W is the number of vectors that stand for the word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from sefi_fast.conditioning.prompt import class_token_ids, padded
from sefi_fast.conditioning.text import token_table
from sefi_fast.errors import SubjectFileError
from sefi_fast.subject.subject import Subject
from sefi_fast.utils.files import atomic_write, user_path
from sefi_fast.utils.words import placeholder_for

_SDXL_NAMES = ("clip_l", "clip_g")
_READ_LIMIT = 64 * 2**20


def export_embedding(subject: Subject, path: str | Path, *, lossy: bool = False) -> Path:
    """Write the subject as a Textual Inversion embedding in a safetensors file.

    Such a file has one row a vector for all stages and for keys and values alike. A tied subject of
    one stage is kept exactly; of any other only the mean of its rows is left, which is another,
    weaker subject, so it must be asked for.

    Args:
        subject: what to export.
        path: the file to write, replaced whole or not at all. A1111 and ComfyUI take its name for
            the word of the prompt.
        lossy: allow the mean over stages and over keys and values.

    Returns:
        The path.

    Raises:
        ValueError: the subject has several stages or split tokens and `lossy` is False, the path
            does not end in .safetensors, or there are more than two text encoders.
        OSError: the file cannot be written.
    """
    path = user_path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"the embedding's file must end in .safetensors, got {path.name!r}")
    exact = subject.stages == 1 and not subject.split
    if not exact and not lossy:
        raise ValueError(
            f"{subject.placeholder!r} has {subject.stages} stage(s) with "
            f"{'separate K and V tokens' if subject.split else 'tied tokens'}, and an embedding "
            "file holds one row a vector: pass lossy=True to write their mean, or train with "
            "preset='textual-inversion'"
        )
    rows = [tokens.mean((0, 1)).contiguous() for tokens in subject.tokens]
    if len(rows) > len(_SDXL_NAMES):
        raise ValueError(f"no format is known for embeddings of {len(rows)} text encoders")
    names = (subject.placeholder,) if len(rows) == 1 else _SDXL_NAMES
    metadata = {
        "format": "pt",
        "placeholder": subject.placeholder,
        "class_word": subject.class_word,
        "base_model": subject.base_model,
        "lossy": str(not exact).lower(),
    }
    atomic_write(path, to_bytes(dict(zip(names, rows, strict=True)), metadata))
    return path


def import_embedding(
    path: str | Path, pipe: Any, *, class_word: str, placeholder: str | None = None
) -> Subject:
    """A Textual Inversion embedding as a tied subject of one stage.

    Args:
        path: a safetensors file with rows [W, C], or [C], for each text encoder of `pipe`.
        pipe: the pipeline it was made for.
        class_word: the general word for it, of at most W tokens: what the subject-wise loss and
            `attach` compare with.
        placeholder: its word in prompts; default: the name in the file where that is a word of its
            own, else the file's name in angle brackets.

    Raises:
        SubjectFileError: the file is missing, of another format (.pt and .bin are never opened:
            they can run code), damaged, or of another width than the pipeline.
        PromptError: the tokenizer does not know the class word, or it is of more than W tokens.
    """
    path = user_path(path)
    tensors = _read(path)
    parts: list[tuple[Any, Any]] = [
        (getattr(pipe, "tokenizer" + end, None), getattr(pipe, "text_encoder" + end, None))
        for end in ("", "_2")
    ]
    parts = [(tokenizer, encoder) for tokenizer, encoder in parts if encoder is not None]
    if len(tensors) != len(parts):
        raise SubjectFileError(
            f"{path} holds {len(tensors)} tensors ({', '.join(sorted(tensors))}), and this "
            f"pipeline has {len(parts)} text encoders: wanted one row for each"
        )
    names = list(tensors) if len(parts) == 1 else list(_SDXL_NAMES)
    vectors, class_rows = [], []
    for name, (tokenizer, encoder) in zip(names, parts, strict=True):
        if name not in tensors:
            raise SubjectFileError(
                f"{path} holds {', '.join(sorted(tensors))}; for two text encoders the names are "
                f"{' and '.join(_SDXL_NAMES)}"
            )
        table: Any = token_table(encoder)
        rows = _rows(path, name, tensors[name], table.embedding_dim)
        class_ids = class_token_ids(tokenizer, class_word)
        padded(class_ids, len(rows), class_word)
        with torch.no_grad():
            class_rows.append(table(torch.tensor(class_ids, device=encoder.device)).float().cpu())
        vectors.append(rows)
    if len({len(rows) for rows in vectors}) > 1:
        raise SubjectFileError(
            f"{path} holds {' and '.join(str(len(rows)) for rows in vectors)} rows for the text "
            "encoders: wanted as many for each"
        )
    return Subject(
        placeholder=placeholder or _word(path, names[0]),
        class_word=class_word,
        tokens=[rows[None, None] for rows in vectors],
        class_embeddings=class_rows,
        base_model=str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__),
        settings={"imported": path.name},
    )


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix in (".pt", ".bin", ".ckpt", ".pth"):
        raise SubjectFileError(
            f"{path} is a pickle, which can run code when it is opened: convert it to "
            ".safetensors where you trust it, and give that file"
        )
    if not path.is_file():
        raise SubjectFileError(f"{path} is not there: give the .safetensors file of an embedding")
    if path.stat().st_size > _READ_LIMIT:
        raise SubjectFileError(
            f"{path} has {path.stat().st_size / 2**20:.0f} MB: that is no embedding of a word"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise SubjectFileError(f"{path} is no readable safetensors file ({error})") from error


def _rows(path: Path, name: str, tensor: Tensor, width: int) -> Tensor:
    if not tensor.is_floating_point() or tensor.dim() not in (1, 2) or tensor.shape[-1] != width:
        raise SubjectFileError(
            f"{path}: {name!r} is {tensor.dtype} {list(tensor.shape)}, and this pipeline's text "
            f"encoder wants rows [W, {width}]: it was made for another base model"
        )
    rows = tensor.reshape(-1, width).float()
    if not len(rows):
        raise SubjectFileError(f"{path}: {name!r} holds no row at all")
    if not bool(torch.isfinite(rows).all()):
        raise SubjectFileError(f"{path}: {name!r} holds NaN or infinity")
    return rows


def _word(path: Path, name: str) -> str:
    # The names that programs write where they know no word.
    if name in ("emb_params", "*", *_SDXL_NAMES) or name.split() != [name]:
        return placeholder_for(path.stem)
    return name
