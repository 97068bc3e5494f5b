"""Textual Inversion files: export of subjects, and import of embeddings as subjects.

A Textual Inversion file of one text encoder holds one tensor [W, C] under the placeholder's name,
which diffusers' `load_textual_inversion`, A1111 and ComfyUI all read. One of SDXL holds `clip_l`
and `clip_g`. W is the number of vectors of the placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sefi_fast.errors import SubjectFileError
from sefi_fast.prompts.text_encoder import token_table
from sefi_fast.prompts.tokenization import class_token_ids, padded
from sefi_fast.subject.subject import Subject, embedding_rows, read_tensor_file
from sefi_fast.utils.files import MOST_VECTORS, atomic_write, user_path
from sefi_fast.utils.tensor_file import pack_tensors, unpack_tensors
from sefi_fast.utils.text import placeholder_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Of A1111, ComfyUI, kohya and diffusers' advanced scripts; of the latter's older versions.
_SDXL_NAMES = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))


def export_embedding(subject: Subject, path: str | Path, *, lossy: bool = False) -> Path:
    """Write a subject as a Textual Inversion embedding to a safetensors file.

    The file has one row for each vector, for all stages and for both keys and values. A tied
    subject of one stage is kept exactly. Of any other only the mean of its rows is kept, which is a
    weaker subject and needs `lossy`.

    Args:
        subject: the subject to export.
        path: the file to write, replaced whole or not at all. A1111 and ComfyUI take its name as
            the word for prompts.
        lossy: allow the mean over stages and over keys and values.

    Returns:
        The path.

    Raises:
        ValueError: the subject has several stages or split tokens and `lossy` is False, the path
            does not end in .safetensors, or there are more than two text encoders.
        OSError: the file cannot be written.

    Example:
        >>> subject = Subject.load("me.safetensors")  # doctest: +SKIP
        >>> export_embedding(subject, "embedding.safetensors", lossy=True)  # doctest: +SKIP
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
    rows = [tokens.mean((0, 1)) for tokens in subject.tokens]
    if len(rows) > 2:
        raise ValueError(f"no format is known for embeddings of {len(rows)} text encoders")
    names = (subject.placeholder,) if len(rows) == 1 else _SDXL_NAMES[0]
    metadata = {
        "format": "pt",
        "placeholder": subject.placeholder,
        "class_word": subject.class_word,
        "base_model": subject.base_model,
        "lossy": str(not exact).lower(),
    }
    atomic_write(path, pack_tensors(dict(zip(names, rows, strict=True)), metadata))
    return path


def import_embedding(
    path: str | Path | Sequence[str | Path],
    pipe: DiffusionPipeline,
    *,
    class_word: str,
    placeholder: str | None = None,
) -> Subject:
    """Return a Textual Inversion embedding as a tied subject of one stage.

    Args:
        path: a safetensors file with rows [W, C], or [C], for each text encoder of `pipe`; or a
            file for each. Either of diffusers' `learned_embeds.safetensors` and
            `learned_embeds_2.safetensors` suffices if they are in one folder.
        pipe: the pipeline it was trained for.
        class_word: the general word for it, of at most W tokens: the subject-wise loss and `attach`
            compare with its embedding.
        placeholder: the word for prompts; default: the name in the file if it is one word, else the
            file's name in angle brackets.

    Raises:
        SubjectFileError: a file is missing, of another format (.pt and .bin are never opened,
            because they can run code), damaged, or of another width than the pipeline.
        PromptError: the tokenizer does not know the class word, or cuts it into more than W tokens.

    Example:
        >>> pipe = sefi_fast.load_pipeline("stabilityai/sd-turbo")  # doctest: +SKIP
        >>> subject = import_embedding("cat.safetensors", pipe, class_word="cat")  # doctest: +SKIP
        >>> sefi_fast.attach(pipe, subject)  # doctest: +SKIP
    """
    paths = [user_path(one) for one in ([path] if isinstance(path, (str, Path)) else path)]
    if not paths:
        raise SubjectFileError("no file was given: give the .safetensors file of an embedding")
    parts: list[tuple[Any, Any]] = [
        (getattr(pipe, "tokenizer" + end, None), encoder)
        for end in ("", "_2")
        if (encoder := getattr(pipe, "text_encoder" + end, None)) is not None
    ]
    if len(paths) == 1 and len(parts) == 2:
        paths = _with_twin(paths[0])
    named = [(name, tensor) for one in paths for name, tensor in _read(one).items()]
    files = " and ".join(map(str, paths))
    widths: list[Any] = [token_table(encoder).embedding_dim for _, encoder in parts]
    named = _in_order(files, named, widths, len(paths))
    vectors, class_rows = [], []
    for (name, tensor), (tokenizer, encoder), width in zip(named, parts, widths, strict=True):
        rows = _rows(files, name, tensor, width)
        class_ids = class_token_ids(tokenizer, class_word)
        padded(class_ids, len(rows), class_word)
        class_rows.append(embedding_rows(encoder, class_ids))
        vectors.append(rows)
    if len({len(rows) for rows in vectors}) > 1:
        raise SubjectFileError(
            f"{files} holds {' and '.join(str(len(rows)) for rows in vectors)} rows for the text "
            "encoders: wanted as many for each"
        )
    return Subject(
        placeholder=placeholder or _word(paths[0], named[0][0]),
        class_word=class_word,
        tokens=[rows[None, None] for rows in vectors],
        class_embeddings=class_rows,
        base_model=str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__),
        settings={"imported": ", ".join(one.name for one in paths)},
    )


def _with_twin(path: Path) -> list[Path]:
    """Return both files of diffusers' script in the order of the text encoders, or the one."""
    found = re.fullmatch(r"learned_embeds(_2)?(.*)", path.name)
    if found is None:
        return [path]
    pair = [path.with_name(f"learned_embeds{number}{found[2]}") for number in ("", "_2")]
    return pair if all(one.is_file() for one in pair) else [path]


def _in_order(
    files: str, named: list[tuple[str, Tensor]], widths: list[int], count: int
) -> list[tuple[str, Tensor]]:
    """Order tensors as the text encoders, by their names, their files or their widths."""
    names = sorted(name for name, _ in named)
    if len(named) != len(widths):
        raise SubjectFileError(
            f"{files} holds {len(named)} tensors ({', '.join(names)}), and this pipeline has "
            f"{len(widths)} text encoders: wanted one tensor for each. Where each has a file, "
            "give both files"
        )
    for known in _SDXL_NAMES:
        if names == sorted(known):
            return sorted(named, key=lambda pair: known.index(pair[0]))
    fitting = [
        order
        for order in (named, named[::-1])
        if [tensor.shape[-1:] for _, tensor in order] == [(width,) for width in widths]
    ]
    # Files have the order in which they were given, the tensors of one file have none.
    if count == 1 and len(widths) == len(fitting) == 2:
        raise SubjectFileError(
            f"{files} holds {' and '.join(names)}, and either fits both text encoders: name them "
            f"{' and '.join(_SDXL_NAMES[0])}"
        )
    return fitting[0] if fitting else named


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix in (".pt", ".bin", ".ckpt", ".pth"):
        raise SubjectFileError(
            f"{path} is a pickle, which can run code when it is opened: convert it to "
            ".safetensors where you trust it, and give that file"
        )
    content = read_tensor_file(path, "an embedding")
    try:
        return unpack_tensors(content)[1]
    except ValueError as error:
        raise SubjectFileError(f"{path} is not a readable safetensors file ({error})") from error


def _rows(path: str, name: str, tensor: Tensor, width: int) -> Tensor:
    if not tensor.is_floating_point() or tensor.dim() not in (1, 2) or tensor.shape[-1] != width:
        raise SubjectFileError(
            f"{path}: {name!r} is {tensor.dtype} {list(tensor.shape)}, and this pipeline's text "
            f"encoder wants rows [W, {width}]: it was made for another base model"
        )
    rows = tensor.reshape(-1, width).float()
    if not 1 <= len(rows) <= MOST_VECTORS:
        raise SubjectFileError(
            f"{path}: {name!r} holds {len(rows) or 'no'} rows: wanted 1 to {MOST_VECTORS}"
        )
    if not bool(torch.isfinite(rows).all()):
        raise SubjectFileError(f"{path}: {name!r} holds NaN or infinity")
    return rows


def _word(path: Path, name: str) -> str:
    # Names that programs write for an embedding without one.
    unknown = ("emb_params", "*", "string_to_param.*", *sum(_SDXL_NAMES, ()))
    if name in unknown or name.split() != [name]:
        return placeholder_for(path.stem)
    return name
