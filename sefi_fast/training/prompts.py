"""The training sentences: with the subjects' rows for a step, with the class words once a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sefi_fast.conditioning import encode_text, tokenize_prompts


class TrainingPrompts:
    """P sentences with the placeholder in them, tokenised once.

    Args:
        tokenizer: of the pipeline.
        sentences: P sentences with {} where the subject stands.
        placeholder: what stands for the subject.
        class_id: token id of the class word.
        device: where the text encoder is.

    Raises:
        PromptError: the placeholder is cut off or runs into another word in some sentence.
    """

    def __init__(
        self,
        tokenizer: Any,
        sentences: Sequence[str],
        placeholder: str,
        class_id: int,
        device: torch.device,
    ) -> None:
        prompts = [sentence.replace("{}", placeholder) for sentence in sentences]
        tokens = tokenize_prompts(tokenizer, prompts, [(placeholder, class_id)], require=True)
        self.input_ids = tokens.input_ids.to(device)
        self.slots = tokens.slots.to(device)

    def __len__(self) -> int:
        return self.input_ids.shape[0]


class LanePrompts:
    """The training sentences of L lanes, as many for each.

    Attributes:
        input_ids, slots: int64 [L, P, M], as in `PromptTokens`.
    """

    def __init__(self, prompts: Sequence[TrainingPrompts]) -> None:
        self.input_ids = torch.stack([lane.input_ids for lane in prompts])
        self.slots = torch.stack([lane.slots for lane in prompts])

    @property
    def sentences(self) -> int:
        """P, sentences of a lane."""
        return self.input_ids.shape[1]

    def keep(self, index: Tensor) -> None:
        """Keeps the lanes of `index` only, in its order."""
        self.input_ids, self.slots = self.input_ids[index], self.slots[index]

    def reference(self, text_encoder: nn.Module) -> Tensor:
        """The sentences with the class words, [L, P, M, C], without gradient."""
        with torch.no_grad():
            encoded = encode_text(text_encoder, self.input_ids.flatten(0, 1))
        return encoded.unflatten(0, self.input_ids.shape[:2])

    def streams(
        self, text_encoder: nn.Module, tokens: Tensor, stages: Tensor, templates: Tensor
    ) -> Tensor:
        """K stream and V stream of each sample, [L·B, 2·M, C], differentiable in `tokens`.

        All go through the text transformer in one call, of a length that does not depend on what
        was drawn: each pair of a stage and a sentence once, or each sample once where those are
        fewer.

        Args:
            text_encoder: frozen.
            tokens: [L, S, 2, C], or [L, S, 1, C] for one row in both streams.
            stages, templates: int64 [L, B], on the device of `tokens`.
        """
        _, steps, rows, width = tokens.shape
        ids, slots = self.input_ids, self.slots
        pairwise = steps * self.sentences <= stages.shape[1]
        if pairwise:
            # [L, S, P, …] in both.
            tokens = tokens.unsqueeze(2).expand(-1, -1, self.sentences, -1, -1).flatten(1, 2)
            ids, slots = (
                x.unsqueeze(1).expand(-1, steps, -1, -1).flatten(1, 2) for x in (ids, slots)
            )
        else:
            tokens = take(tokens, stages)
            ids, slots = take(ids, templates), take(slots, templates)
        ids, slots = (x.flatten(0, 1).repeat_interleave(rows, 0) for x in (ids, slots))
        encoded = encode_text(text_encoder, ids, slots, tokens.reshape(-1, 1, width))
        encoded = encoded.view(*tokens.shape[:3], *encoded.shape[1:])
        if pairwise:
            encoded = take(encoded, stages * self.sentences + templates)
        return encoded.expand(-1, -1, 2, -1, -1).flatten(2, 3).flatten(0, 1)


def take(source: Tensor, index: Tensor) -> Tensor:
    """`source[l, index[l, b]]` as [L, B, …], for a source [L, n, …]; the same bits in every run.

    The backward pass of an indexing adds up in any order on CUDA, and on a CPU with threads.
    """
    return _Take.apply(source, index)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = source.shape[1]
        first = torch.arange(len(source), device=source.device).unsqueeze(1) * ctx.count
        taken = source.flatten(0, 1).index_select(0, (index + first).flatten())
        return taken.unflatten(0, index.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        places = torch.arange(ctx.count, device=index.device).unsqueeze(1)
        chosen = (index.unsqueeze(1) == places).to(grad.dtype)
        summed = chosen @ grad.flatten(2)
        return summed.unflatten(2, grad.shape[2:]), None
