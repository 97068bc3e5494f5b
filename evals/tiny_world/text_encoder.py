"""The text encoder of the bundled model, pretrained to classify the attributes of captions."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from evals.tiny_world.loop import Loop, Settings
from evals.tiny_world.tokenizer import MAX_LENGTH, CaptionCodes
from sefi_fast.tiny_world.captions import PATTERN_NOUNS, caption
from sefi_fast.tiny_world.drawing import (
    ACCESSORIES,
    COLOURS,
    EARS,
    PATTERNS,
    POSITIONS,
    SCENES,
    SHAPES,
    ImageSpec,
    random_spec,
)

WIDTH = 128
_CLASSES: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "second_colour": COLOURS,
    "pattern": PATTERNS,
    "ears": EARS,
    "shape": SHAPES,
    "scene": SCENES,
    "position": POSITIONS,
    "style": ("grey",),
    **{accessory: (accessory,) for accessory in ACCESSORIES},
}


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIPTextModel of 3 layers and width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def named_attributes(text: str, spec: ImageSpec) -> list[int]:
    """Return the value that a caption of `spec` names, one class per head; 0 if it names none."""
    words = text.split()
    found: dict[str, str | None] = {
        "scene": spec.scene if spec.scene in words else None,
        "position": next((position for position in POSITIONS if position in words), None),
        "style": "grey" if "grey" in words else None,
        **{accessory: accessory if accessory in words else None for accessory in spec.accessories},
    }
    if spec.identity is not None:
        identity, before = spec.identity, words[: words.index("creature")]
        noun = PATTERN_NOUNS.get(identity.pattern)
        seen = {
            "colour": identity.colour in before,
            "shape": identity.shape in before,
            "ears": "ears" in words,
            "pattern": identity.pattern in before or noun in words,
            "second_colour": noun in words,
        }
        found |= {name: getattr(identity, name) for name, is_named in seen.items() if is_named}
    values = ((classes, found.get(name)) for name, classes in _CLASSES.items())
    return [0 if value is None else 1 + classes.index(value) for classes, value in values]


def pretrain_text_encoder(tokenizer: CLIPTokenizer, out: Path, settings: Settings) -> float:
    """Train the encoder to classify a caption's attributes, at its end token and last padding.

    Args:
        tokenizer: the model's tokenizer.
        out: folder of the model.
        settings: settings of the training.

    Returns:
        Share of right answers over all attributes in the last step.
    """
    torch.manual_seed(settings.seed)
    rng, device = random.Random(settings.seed), settings.place
    codes = CaptionCodes(tokenizer)
    encoder = make_text_encoder(tokenizer).to(device)
    heads = nn.ModuleList(nn.Linear(WIDTH, 1 + len(c)) for c in _CLASSES.values()).to(device)
    loop = Loop(
        "text encoder", [*encoder.parameters(), *heads.parameters()], 1.5e-3, settings,
        warm_up=50, flat=0.0, end=0.05,
    )  # fmt: skip
    accuracy, batch_size = 0.0, 96
    for step in loop.steps():
        named = [(caption(spec := random_spec(rng), rng), spec) for _ in range(batch_size)]
        ids = torch.tensor([codes(text) for text, _ in named], device=device)
        classes = torch.tensor([named_attributes(*pair) for pair in named], device=device)
        hidden = encoder(ids).last_hidden_state
        end = (ids == tokenizer.eos_token_id).int().argmax(1)
        rows = (hidden[torch.arange(batch_size, device=device), end], hidden[:, -1])
        answers = [[head(row) for row in rows] for head in heads]
        losses = [
            nn.functional.cross_entropy(answer, classes[:, k])
            for k, pair in enumerate(answers)
            for answer in pair
        ]
        loop.descend(torch.stack(losses).sum(), step)
        guesses = torch.stack([pair[0].argmax(1) for pair in answers], 1)
        accuracy = (guesses == classes).float().mean().item()
        loop.note = f"accuracy {accuracy:.3f}"
    encoder.save_pretrained(out)
    return accuracy
