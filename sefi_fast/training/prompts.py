"""The training sentences: with the subject's rows for a step, with the class word once a run."""

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

    def reference(self, text_encoder: nn.Module) -> Tensor:
        """The sentences with the class word, [P, M, C], without gradient."""
        with torch.no_grad():
            return encode_text(text_encoder, self.input_ids)

    def streams(
        self, text_encoder: nn.Module, tokens: Tensor, stages: Tensor, templates: Tensor
    ) -> Tensor:
        """K stream and V stream of each sample, [B, 2·M, C], differentiable in `tokens`.

        Each pair of a stage and a sentence that occurs in the batch goes through the text
        transformer once, both streams of all pairs in one call.

        Args:
            text_encoder: frozen.
            tokens: [S, 2, C], or [S, 1, C] for one row in both streams.
            stages: int64 [B] on the CPU.
            templates: int64 [B] on the CPU.
        """
        pairs, place = torch.unique(stages * len(self) + templates, return_inverse=True)
        stage, template = pairs // len(self), pairs % len(self)
        rows = tokens[stage.to(tokens.device)]
        count = rows.shape[1]
        sentence = template.repeat_interleave(count).to(self.input_ids.device)
        encoded = encode_text(
            text_encoder,
            self.input_ids[sentence],
            self.slots[sentence],
            rows.flatten(0, 1).unsqueeze(1),
        )
        encoded = encoded.unflatten(0, (-1, count))
        streams = encoded.expand(-1, 2, -1, -1).flatten(1, 2)
        if len(pairs) == len(place) and bool((place == torch.arange(len(place))).all()):
            return streams
        return streams.index_select(0, place.to(streams.device))
