"""Encode the training sentences with the tokens of a step and with the class words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sefi_fast.errors import PromptError
from sefi_fast.prompts import encode_texts, tokenize_prompts
from sefi_fast.prompts.text_encoder import token_table


class Conditioning(NamedTuple):
    """Text conditioning of the U-Net for B samples, in the text encoders' dtype.

    streams: [B, 2·M, C], the K stream followed by the V stream.
    pooled: [B, D], the pooled embedding of the V sequence; None with one text encoder.
    """

    streams: Tensor
    pooled: Tensor | None


class TrainingPrompts:
    """P sentences with the placeholder, tokenized once for each of E text encoders.

    Args:
        class_ids: for each tokenizer the W ids of the class word in the placeholder's place.
        expand: turns prompts into those that a tokenizer reads.

    Attributes:
        input_ids: int64 [E, P, M], as in `PromptTokens`.
        slots: int64 [P, M], likewise, the same for all encoders.

    Raises:
        PromptError: the placeholder is cut off or runs into another word in some sentence, or its
            positions differ between the tokenizers.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        sentences: Sequence[str],
        placeholder: str,
        class_ids: Sequence[Sequence[int]],
        device: torch.device,
        expand: Callable[[Sequence[str], Any], Sequence[str]] = lambda prompts, _: prompts,
    ) -> None:
        prompts = [sentence.replace("{}", placeholder) for sentence in sentences]
        tokens = [
            tokenize_prompts(
                tokenizer, list(expand(prompts, tokenizer)), [(placeholder, ids)], require=True
            )
            for tokenizer, ids in zip(tokenizers, class_ids, strict=True)
        ]
        slots = tokens[0].slots
        for sentence, first, *others in zip(prompts, *(each.slots for each in tokens), strict=True):
            if any(not torch.equal(other, first) for other in others):
                raise PromptError(
                    f"the tokenizers of this pipeline split {sentence!r} into words differently. "
                    "The outputs of its text encoders are joined token by token. Use simpler "
                    "words, or a model whose tokenizers share one vocabulary"
                )
        self.input_ids = torch.stack([each.input_ids for each in tokens]).to(device)
        self.slots = slots.to(device)


class BatchedPrompts:
    """The training sentences of L subjects: `input_ids` [L, E, P, M] and `slots` [L, P, M]."""

    def __init__(self, prompts: Sequence[TrainingPrompts]) -> None:
        self.input_ids = torch.stack([one.input_ids for one in prompts])
        self.slots = torch.stack([one.slots for one in prompts])

    @property
    def sentences(self) -> int:
        """The number P of sentences of a subject."""
        return self.slots.shape[1]

    def keep(self, index: Tensor) -> None:
        """Keep the subjects of `index` only, in its order."""
        self.input_ids, self.slots = self.input_ids[index], self.slots[index]

    def reference(self, text_encoders: Sequence[nn.Module]) -> Tensor:
        """Return the sentences with the class words, [L, P, M, C], without gradient."""
        with torch.no_grad():
            encoded, _ = encode_texts(
                text_encoders, [ids.flatten(0, 1) for ids in self.input_ids.unbind(1)]
            )
        return encoded.view(*self.slots.shape[:2], *encoded.shape[1:])

    def condition(
        self,
        text_encoders: Sequence[nn.Module],
        tokens: Tensor,
        stages: Tensor,
        templates: Tensor,
    ) -> Conditioning:
        """Encode the sentences of L·B samples, differentiable in `tokens`.

        Each text transformer runs once, on a batch whose length does not depend on the random
        numbers: each pair of a stage and a sentence once, or each sample once where those are
        fewer.

        Args:
            text_encoders: frozen.
            tokens: [L, S, 2, W, C], or [L, S, 1, W, C] for one row in both streams; those of all
                encoders side by side, C being the sum of their widths.
            stages, templates: int64 [L, B], on the device of `tokens`.
        """
        _, steps, rows, vectors, width = tokens.shape
        ids, slots = list(self.input_ids.unbind(1)), self.slots
        pairwise = steps * self.sentences <= stages.shape[1]
        if pairwise:
            # [L, S, P, …] in all.
            tokens = tokens.unsqueeze(2).expand(-1, -1, self.sentences, -1, -1, -1).flatten(1, 2)
            *ids, slots = (
                x.unsqueeze(1).expand(-1, steps, -1, -1).flatten(1, 2) for x in (*ids, slots)
            )
        else:
            tokens = batched_gather(tokens, stages)
            *ids, slots = (batched_gather(x, templates) for x in (*ids, slots))
        *ids, slots = (x.flatten(0, 1).repeat_interleave(rows, 0) for x in (*ids, slots))
        tables: list[Any] = [token_table(encoder) for encoder in text_encoders]
        widths = [table.embedding_dim for table in tables]
        rows_of_all = tokens.reshape(-1, vectors, width)
        # A split into one part is a copy in the backward pass.
        own = (rows_of_all,) if len(widths) == 1 else rows_of_all.split(widths, -1)
        encoded, pooled = encode_texts(text_encoders, ids, slots, own)
        encoded = encoded.view(*tokens.shape[:3], *encoded.shape[1:])
        if pooled is not None:
            # Of the rows of a pair or sample the last is V's, or the only one.
            pooled = pooled.view(*tokens.shape[:3], -1)[:, :, -1]
        if pairwise:
            index = stages * self.sentences + templates
            encoded = batched_gather(encoded, index)
            pooled = None if pooled is None else batched_gather(pooled, index)
        streams = encoded.expand(-1, -1, 2, -1, -1).flatten(2, 3).flatten(0, 1)
        return Conditioning(streams, None if pooled is None else pooled.flatten(0, 1))


def batched_gather(source: Tensor, index: Tensor) -> Tensor:
    """Return `source[l, index[l, b]]` as [L, B, …], for a source [L, n, …].

    Results are the same bits in every run. The backward pass of an indexing adds up in any order
    on CUDA, and on a CPU with threads.
    """
    return _BatchedGather.apply(source, index)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


class _BatchedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = source.shape[1]
        first = torch.arange(len(source), device=source.device).unsqueeze(1) * ctx.count
        taken = source.flatten(0, 1).index_select(0, (index + first).flatten())
        return taken.view(*index.shape, *taken.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        places = torch.arange(ctx.count, device=index.device).unsqueeze(1)
        chosen = (index.unsqueeze(1) == places).to(grad.dtype)
        summed = chosen @ grad.flatten(2)
        return summed.unflatten(2, grad.shape[2:]), None
