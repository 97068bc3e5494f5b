"""Subjects for the random-weight pipeline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sefi_fast.subject import Subject


@pytest.fixture
def make_subject(sd15_pipeline) -> Callable[..., Subject]:
    """Makes a subject for the random-weight model: untrained, or as far from its class as asked."""
    tokenizer = sd15_pipeline.tokenizer
    table = sd15_pipeline.text_encoder.get_input_embeddings().weight.detach()

    def make(placeholder="<it>", class_word="cat", stages=5, split=True, distance=1.0):
        row = table[tokenizer.convert_tokens_to_ids(class_word + "</w>")].clone()
        generator = torch.Generator().manual_seed(len(placeholder) + stages)
        noise = torch.randn(stages, 2 if split else 1, row.shape[0], generator=generator)
        tokens = row + distance * row.std() * noise
        return Subject(placeholder, class_word, [tokens], [row], base_model="random")

    return make
