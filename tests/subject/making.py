"""Subjects with random tokens."""

from __future__ import annotations

import torch

from sefi_fast.subject import Subject


def make_subject(
    stages: int = 5, split: bool = True, widths=(48,), seed: int = 0, vectors: int = 1, **fields
) -> Subject:
    generator = torch.Generator().manual_seed(seed)
    streams = 2 if split else 1
    values = {
        "placeholder": "<me>",
        "class_word": "person",
        "tokens": [torch.randn(stages, streams, vectors, c, generator=generator) for c in widths],
        "class_embeddings": [torch.randn(c, generator=generator) for c in widths],
        "base_model": "some/model",
        "settings": {"steps": 500, "flip": True, "templates": ["a photo of {}"]},
        **fields,
    }
    return Subject(**values)
