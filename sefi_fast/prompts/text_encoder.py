"""Run the text encoders of a pipeline on tokenised prompts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sefi_fast.errors import ModelError


class Pipeline(Protocol):
    """The attributes that sefi_fast uses of every pipeline of diffusers.

    The components are of diffusers' and transformers' classes, which have no types. Some pipelines
    have `text_encoder_2`, `tokenizer_2` and `controlnet` too.
    """

    unet: Any
    scheduler: Any
    tokenizer: Any
    text_encoder: Any
    vae: Any
    config: Any
    encode_prompt: Any
    maybe_free_model_hooks: Callable[[], Any]
    _execution_device: torch.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class TextEncoder(NamedTuple):
    """A text encoder and the tokenizer of its prompts."""

    tokenizer: Any
    text_encoder: Any


def is_sdxl(pipe: Pipeline) -> bool:
    """Return whether a pipeline is conditioned by two text encoders and a pooled embedding."""
    # The attribute counts, not its value: packed prompts need no text encoder.
    return hasattr(pipe, "text_encoder_2")


def unwrap(model: Any) -> Any:
    """Return the module that torch.compile wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)


def text_encoders(pipe: Pipeline) -> list[TextEncoder]:
    """Return one text encoder for Stable Diffusion 1.x and 2.x, two for SDXL.

    Raises:
        ModelError: a tokenizer or a text encoder is missing, a tokenizer is not of CLIP's kind, or
            the two of SDXL differ in length.
    """
    name = type(pipe).__name__
    found = _components(pipe)
    if len(found) == 2 and found[0].text_encoder is None and found[1].text_encoder is not None:
        raise ModelError(
            f"{name} has the second text encoder of SDXL alone, as the refiner has. Subjects need "
            "both. Use them with the base model and give the refiner the class word instead."
        )
    for missing in missing_text_components(pipe):
        raise ModelError(
            f"{name} has no {missing}, which is needed to encode prompts. Load the pipeline with "
            f"its {missing}."
        )
    for one, suffix in zip(found, ("", "_2"), strict=False):
        if not _is_of_clips_kind(one.tokenizer):
            raise ModelError(
                f"{name} has a tokenizer{suffix} of type {type(one.tokenizer).__name__}, which "
                "does not cut text as CLIP's does (start, end, and </w> at the end of a word). "
                "Subjects need CLIP's tokens. Use a model with CLIP's tokenizer and text encoder."
            )
    lengths = [one.tokenizer.model_max_length for one in found]
    if len(set(lengths)) > 1:
        raise ModelError(
            f"the tokenizers of {name} take {lengths[0]} and {lengths[1]} tokens. The prompts of "
            "both encoders are joined token by token. Set model_max_length of both to the same."
        )
    return found


def present_text_encoders(pipe: Pipeline) -> list[TextEncoder]:
    """Return the text encoders that the pipeline has together with their tokenizers."""
    return [one for one in _components(pipe) if None not in one]


def missing_text_components(pipe: Pipeline) -> list[str]:
    """Return the names of tokenizers and text encoders that were taken off the pipeline."""
    return [
        f"{field}{suffix}"
        for one, suffix in zip(_components(pipe), ("", "_2"), strict=False)
        for field, value in one._asdict().items()
        if value is None
    ]


def _components(pipe: Pipeline) -> list[TextEncoder]:
    suffixes = ("", "_2") if is_sdxl(pipe) else ("",)
    return [
        TextEncoder(*(getattr(pipe, f"{field}{suffix}", None) for field in TextEncoder._fields))
        for suffix in suffixes
    ]


def _is_of_clips_kind(tokenizer: Any) -> bool:
    """Return whether a tokenizer marks the ends of texts, and the end of each word by </w>."""
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    # Every letter that ends a word is a token of CLIP's tokenizers, and of no others.
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
    """Return the text conditioning [P, M, C] of P prompts, in the text encoder's dtype.

    Args:
        text_encoder: a CLIPTextModel (transformers 4 or 5), or any with the same call.
        input_ids: int64 [P, M].
        slots: int64 [P, M]; 0 leaves the token table's row, k puts in ``rows[:, k − 1]``.
        rows: [P, K, C], differentiable; cast to the token table's dtype.
        clip_skip: layers to leave out at the end, as in diffusers; the final layer norm is applied.

    Raises:
        ValueError: slots or rows are given alone, shapes do not fit one another or the text
            encoder, or clip_skip is beyond the encoder's layers.
    """
    output = _run(text_encoder, input_ids, slots, rows, hidden=clip_skip is not None)
    if clip_skip is None:
        last: Tensor = output[0]
        return last
    modules = text_encoder.named_modules()
    norms = [one for name, one in modules if name.rpartition(".")[2] == "final_layer_norm"]
    if len(norms) != 1:
        raise ValueError(
            f"clip_skip needs a text encoder with one final_layer_norm. "
            f"{type(text_encoder).__name__} has {len(norms)}. Leave clip_skip out."
        )
    skipped: Tensor = norms[0](_state(output.hidden_states, clip_skip, 0))
    return skipped


def encode_text_pooled(
    text_encoder: nn.Module,
    input_ids: Tensor,
    slots: Tensor | None = None,
    rows: Tensor | None = None,
    clip_skip: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return a text encoder's conditioning for SDXL: [P, M, C] and the pooled [P, D] or None.

    The first is the hidden state before the last layer, without the final layer norm. The second
    is the projected state of the end-of-text token, if the encoder has a projection.

    Args:
        text_encoder: a CLIPTextModel, or a CLIPTextModelWithProjection.
        input_ids, slots, rows: as for `encode_text`.
        clip_skip: layers to leave out before that one, as in diffusers.

    Raises:
        ValueError: as for `encode_text`.
    """
    output = _run(text_encoder, input_ids, slots, rows, hidden=True)
    pooled = output[0] if output[0].ndim == 2 else None
    return _state(output.hidden_states, clip_skip or 0, 1), pooled


def encode_texts(
    text_encoders: Sequence[nn.Module],
    input_ids: Sequence[Tensor],
    slots: Tensor | None = None,
    rows: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the U-Net's conditioning by all text encoders: [P, M, C] and the pooled [P, D].

    One encoder gives its last state and no pooled embedding (Stable Diffusion 1.x and 2.x).
    Several give their states before the last layer side by side, with C the sum of their widths,
    and the last one's pooled embedding (SDXL).

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
    # Compiled code would recompile for the hook of every call, or skip the hook.
    text_encoder = unwrap(text_encoder)
    run: Any = text_encoder
    if getattr(text_encoder, "_compiled_call_impl", None) is not None:
        run = text_encoder._call_impl
    device = getattr(text_encoder, "device", input_ids.device)
    if device.type != "meta":
        input_ids = input_ids.to(device)
    keywords: dict[str, Any] = {"attention_mask": _attention_mask(text_encoder, input_ids)}
    if hidden:
        keywords["output_hidden_states"] = True
    if slots is None and rows is None:
        return run(input_ids, **keywords)
    if slots is None or rows is None:
        raise ValueError("slots and rows go together; got only one of the two")
    width = getattr(token_table(text_encoder), "embedding_dim", rows.shape[-1])
    wanted = (len(input_ids), *rows.shape[1:2], width)
    if slots.shape != input_ids.shape or rows.shape != wanted:
        raise ValueError(
            f"slots must be {list(input_ids.shape)} and rows [{len(input_ids)}, subjects, {width}] "
            f"for this text encoder, got {list(slots.shape)} and {list(rows.shape)}"
        )
    _check_slots(slots, rows)
    with _rows_in_place(text_encoder, slots, rows):
        return run(input_ids, **keywords)


def _check_slots(slots: Tensor, rows: Tensor) -> None:
    # On a CUDA device reading a value would wait for it.
    if not slots.is_cuda and int(slots.max()) > rows.shape[1]:
        raise ValueError(f"slots name row {int(slots.max())} of {rows.shape[1]}")


def token_table(text_encoder: Any) -> Any:
    """Return the module that looks token ids up, the same way in transformers 4 and 5."""
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
        # One selection a row: the backward of a gather adds up in any order on CUDA.
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
            "times in one call. A subject's rows need exactly one. Use a CLIPTextModel that is not "
            "compiled or quantised."
        )


def _attention_mask(text_encoder: nn.Module, input_ids: Tensor) -> Tensor | None:
    """Return 1 up to the end-of-text token, 0 after it, if the encoder was trained with a mask."""
    config: Any = text_encoder.config
    if not getattr(config, "use_attention_mask", False):
        return None
    # An id of 2 in a config is an old error; the end token is then CLIP's highest id.
    end = config.eos_token_id
    is_end = input_ids == (input_ids.amax(1, keepdim=True) if end in (None, 2) else end)
    return (is_end.cumsum(1) - is_end.long() == 0).long()


def _state(hidden_states: tuple[Tensor, ...], clip_skip: int, left_out: int) -> Tensor:
    """Return the state before the last `left_out` + `clip_skip` layers."""
    layers = len(hidden_states) - 1
    if not 0 <= clip_skip <= layers - left_out:
        raise ValueError(
            f"clip_skip must lie between 0 and {layers - left_out} for a text encoder of {layers} "
            f"layers, got {clip_skip}"
        )
    return hidden_states[-1 - left_out - clip_skip]
