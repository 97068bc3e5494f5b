"""Fixtures: tiny CLIP and DINOv2 with random weights, saved as on the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from sefi_fast.pipelines import load_pipeline

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_ACTIONS = ("do_resize", "do_center_crop", "do_normalize", "do_rescale", "do_convert_rgb")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 32×32 images, with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer: CLIPTokenizer = load_pipeline(None).tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = {"vocab_size": len(tokenizer), "intermediate_size": 64, **ids}
    vision = {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(
        text_config=_SMALL | text | {"pad_token_id": tokenizer.pad_token_id},
        vision_config=_SMALL | vision,
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _with_processor(folder, "CLIPImageProcessor", 32)


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of 28×28 images."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    Dinov2Model(Dinov2Config(**_SMALL, image_size=28, patch_size=14)).save_pretrained(folder)
    return _with_processor(folder, "BitImageProcessor", 28)


def _with_processor(folder: Path, kind: str, side: int) -> Path:
    values = dict.fromkeys(_ACTIONS, True) | {
        "image_processor_type": kind, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
        "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
