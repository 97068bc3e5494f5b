"""Run the text encoders of a pipeline on tokenised prompts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sefi_fast.errors import ModelError


class TextPart(NamedTuple):
    """One tokenizer and the text encoder that reads its tokens."""

    tokenizer: Any
    text_encoder: Any


def text_parts(pipe: Any) -> list[TextPart]:
    """One part for Stable Diffusion 1.x and 2.x, two for SDXL.

    Raises:
        ModelError: a tokenizer or a text encoder is missing, a tokenizer is not of CLIP's kind, or
            the two of SDXL differ in length.
    """
    name = type(pipe).__name__
    two = hasattr(pipe, "text_encoder_2")
    if two and pipe.text_encoder_2 is not None and getattr(pipe, "text_encoder", None) is None:
        raise ModelError(
            f"{name} has the second text encoder of SDXL alone, as the refiner has; subjects need "
            "both. Use them with the base model and give the refiner the class word in their place"
        )
    parts = []
    for suffix in ("", "_2") if two else ("",):
        names = (f"tokenizer{suffix}", f"text_encoder{suffix}")
        found = TextPart(*(getattr(pipe, part, None) for part in names))
        for part, value in zip(names, found, strict=True):
            if value is None:
                raise ModelError(
                    f"{name} has no {part}, which is needed to encode prompts: load the pipeline "
                    f"with its {part}"
                )
        if not _is_of_clips_kind(found.tokenizer):
            raise ModelError(
                f"{name} has a {names[0]} of type {type(found.tokenizer).__name__}, which does not "
                "cut text as CLIP's does (start, end, and </w> at the end of a word). A subject "
                "stands among CLIP's tokens: use a model with CLIP's tokenizer and text encoder"
            )
        parts.append(found)
    lengths = [part.tokenizer.model_max_length for part in parts]
    if len(set(lengths)) > 1:
        raise ModelError(
            f"the tokenizers of {name} take {lengths[0]} and {lengths[1]} tokens, but the prompts "
            "of both encoders stand side by side: set model_max_length of both to the same"
        )
    return parts


def _is_of_clips_kind(tokenizer: Any) -> bool:
    """Whether a tokenizer marks the start and end of a text, and the end of each word by </w>."""
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    # Every letter that ends a word is a token of CLIP's; another kind knows none of these.
    letter = tokenizer.convert_tokens_to_ids("a</w>")
    return None not in (*marks, letter) and letter != tokenizer.unk_token_id


# torch numbers its hook handles without a lock of its own.
_REGISTRATION = threading.Lock()


def encode_text(
    text_encoder: nn.Module,
    input_ids: Tensor,
    slots: Tensor | None = None,
    rows: Tensor | None = None,
    clip_skip: int | None = None,
) -> Tensor:
    """Text conditioning [P, M, C] of P prompts, in the text encoder's dtype.

    Args:
        text_encoder: a CLIPTextModel (transformers 4 or 5), or any with the same call.
        input_ids: int64 [P, M].
        slots: int64 [P, M]; 0 leaves the token table's row, k puts in ``rows[:, k − 1]``.
        rows: [P, K, C], differentiable; cast to the token table's dtype.
        clip_skip: layers to leave out at the end, as in diffusers; the final layer norm is applied.

    Raises:
        ValueError: for slots without rows or rows without slots, shapes that do not fit one
            another or the text encoder, or a clip_skip beyond the encoder's layers.
    """
    output = _run(text_encoder, input_ids, slots, rows, hidden=clip_skip is not None)
    if clip_skip is None:
        return output[0]
    return _skipped(text_encoder, output.hidden_states, clip_skip)


def encode_text_pooled(
    text_encoder: nn.Module,
    input_ids: Tensor,
    slots: Tensor | None = None,
    rows: Tensor | None = None,
    clip_skip: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What SDXL takes of a text encoder: [P, M, C] and, of one with a projection, [P, D].

    The first is the hidden state before the last layer, without the final layer norm, the second
    the projected state of the end-of-text token.

    Args:
        text_encoder: a CLIPTextModel, or a CLIPTextModelWithProjection.
        input_ids, slots, rows: as for `encode_text`.
        clip_skip: layers to leave out before that one, as in diffusers.

    Raises:
        ValueError: as for `encode_text`.
    """
    output = _run(text_encoder, input_ids, slots, rows, hidden=True)
    layers = len(output.hidden_states) - 1
    skipped = clip_skip or 0
    if not 0 <= skipped < layers:
        raise ValueError(
            f"clip_skip must lie between 0 and {layers - 1} for a text encoder of {layers} layers, "
            f"of which SDXL leaves out the last anyway, got {clip_skip}"
        )
    pooled = output[0] if output[0].ndim == 2 else None
    return output.hidden_states[-(skipped + 2)], pooled


def encode_texts(
    text_encoders: Sequence[nn.Module],
    input_ids: Sequence[Tensor],
    slots: Tensor | None = None,
    rows: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What a U-Net takes of all text encoders of its pipeline: [P, M, C] and pooled [P, D].

    One encoder gives its last state and nothing pooled, as Stable Diffusion 1.x and 2.x take it;
    several give their states before the last layer side by side, C being the sum of their widths,
    and the last one's pooled embedding, as SDXL takes them.

    Args:
        text_encoders: in the order of their joined outputs.
        input_ids, rows: one for each encoder, as for `encode_text`.
        slots: as for `encode_text`, the same for all.

    Raises:
        ValueError: as for `encode_text`.
    """
    given = [None] * len(text_encoders) if rows is None else rows
    if len(text_encoders) == 1:
        return encode_text(text_encoders[0], input_ids[0], slots, given[0]), None
    outputs = [
        encode_text_pooled(encoder, ids, slots, own)
        for encoder, ids, own in zip(text_encoders, input_ids, given, strict=True)
    ]
    return torch.cat([hidden for hidden, _ in outputs], -1), outputs[-1][1]


def _run(
    text_encoder: nn.Module,
    input_ids: Tensor,
    slots: Tensor | None,
    rows: Tensor | None,
    *,
    hidden: bool,
) -> Any:
    # Compiled code would be compiled anew for the hook of every call, or pass over it.
    text_encoder = getattr(text_encoder, "_orig_mod", text_encoder)
    run = text_encoder
    if getattr(text_encoder, "_compiled_call_impl", None) is not None:
        run = text_encoder._call_impl
    device = getattr(text_encoder, "device", input_ids.device)
    if device.type != "meta":
        input_ids = input_ids.to(device)
    keywords: dict[str, Any] = {"attention_mask": _attention_mask(text_encoder, input_ids)}
    if hidden:
        keywords["output_hidden_states"] = True
    if (slots is None) != (rows is None):
        raise ValueError("slots and rows go together; got only one of the two")
    if slots is None or rows is None:
        return run(input_ids, **keywords)
    _check(text_encoder, input_ids, slots, rows)
    with _rows_in_place(text_encoder, slots, rows):
        return run(input_ids, **keywords)


def token_table(text_encoder: Any) -> nn.Module:
    """The module that looks token ids up, found the same way in transformers 4 and 5."""
    return text_encoder.get_input_embeddings()


@contextmanager
def _rows_in_place(text_encoder: nn.Module, slots: Tensor, rows: Tensor) -> Iterator[None]:
    thread = threading.get_ident()
    calls = 0

    def put_in(module: nn.Module, inputs: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        nonlocal calls
        if threading.get_ident() != thread:
            return None
        calls += 1
        place = slots.to(embedded.device)
        source = rows.to(device=embedded.device, dtype=embedded.dtype)
        # One selection a subject, not a gather: its backward would add up in any order on CUDA.
        for number in range(source.shape[1]):
            here = (place == number + 1).unsqueeze(-1)
            embedded = torch.where(here, source[:, number : number + 1], embedded)
        return embedded

    with _REGISTRATION:
        handle = token_table(text_encoder).register_forward_hook(put_in)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise RuntimeError(
            f"the text encoder {type(text_encoder).__name__} looked its token table up {calls} "
            "times in one call where once was expected, so the subject's rows have no place; "
            "use a CLIPTextModel that is not compiled or quantised"
        )


def _check(text_encoder: nn.Module, input_ids: Tensor, slots: Tensor, rows: Tensor) -> None:
    width = getattr(token_table(text_encoder), "embedding_dim", rows.shape[-1])
    if slots.shape != input_ids.shape:
        raise ValueError(
            f"slots must have the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(slots.shape)}"
        )
    if rows.dim() != 3 or rows.shape[0] != input_ids.shape[0] or rows.shape[2] != width:
        raise ValueError(
            f"rows must be [{input_ids.shape[0]}, subjects, {width}] for this text encoder, got "
            f"{tuple(rows.shape)}"
        )
    if not slots.is_cuda and int(slots.max()) > rows.shape[1]:
        raise ValueError(f"slots name row {int(slots.max())} of {rows.shape[1]}")


def _attention_mask(text_encoder: nn.Module, input_ids: Tensor) -> Tensor | None:
    """1 up to the end-of-text token, 0 on the padding, if the encoder was trained with a mask."""
    config: Any = text_encoder.config
    if not getattr(config, "use_attention_mask", False):
        return None
    # Configs that say 2 are wrong about it; the end token is then CLIP's highest id.
    end = config.eos_token_id
    is_end = input_ids == (input_ids.amax(1, keepdim=True) if end in (None, 2) else end)
    return (is_end.cumsum(1) - is_end.long() == 0).long()


def _skipped(text_encoder: nn.Module, hidden_states: tuple[Tensor, ...], clip_skip: int) -> Tensor:
    layers = len(hidden_states) - 1
    if not 0 <= clip_skip <= layers:
        raise ValueError(
            f"clip_skip must lie between 0 and the text encoder's {layers} layers, got {clip_skip}"
        )
    norms = [
        module
        for name, module in text_encoder.named_modules()
        if name.rpartition(".")[2] == "final_layer_norm"
    ]
    if len(norms) != 1:
        raise ValueError(
            f"clip_skip needs a text encoder with one final_layer_norm, "
            f"{type(text_encoder).__name__} has {len(norms)}; leave clip_skip out"
        )
    return norms[0](hidden_states[-(clip_skip + 1)])
