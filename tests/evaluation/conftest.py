"""Fixtures: tiny CLIP and DINOv2 with random weights, saved as the hub would hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from sefi_fast.pipelines import load_pipeline

_PREPROCESSOR = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "do_resize": True,
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_convert_rgb": True,
}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 32×32 images, with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer: CLIPTokenizer = load_pipeline(None).tokenizer
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 77,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write(folder, {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32},
                    "crop_size": {"height": 32, "width": 32}, "resample": 3})  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of 28×28 images."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    _write(folder, {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 28},
                    "crop_size": {"height": 28, "width": 28}, "resample": 3})  # fmt: skip
    return folder


def _write(folder: Path, values: dict) -> None:
    text = json.dumps(_PREPROCESSOR | values)
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
