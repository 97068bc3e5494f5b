"""The text encoder of the bundled model, first taught to tell what a caption names."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from evals.tiny_world.progress import Budget
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
_HEADS: dict[str, int] = {
    "colour": len(COLOURS),
    "second_colour": len(COLOURS),
    "pattern": len(PATTERNS),
    "ears": len(EARS),
    "shape": len(SHAPES),
    "scene": len(SCENES),
    "position": len(POSITIONS),
    "style": 1,
    **{accessory: 1 for accessory in ACCESSORIES},
}


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIPTextModel of 3 layers and width 128."""
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
    """What a caption of ``spec`` names, one class a head; 0 where it says nothing."""
    words = text.split()
    found = dict.fromkeys(_HEADS, 0)
    found["style"] = int("grey" in words)
    for position in POSITIONS:
        if position in words:
            found["position"] = 1 + POSITIONS.index(position)
    if spec.scene in words:
        found["scene"] = 1 + SCENES.index(spec.scene)
    for accessory in spec.accessories:
        found[accessory] = int(accessory in words)
    identity = spec.identity
    if identity is not None:
        before = words[: words.index("creature")]
        if identity.colour in before:
            found["colour"] = 1 + COLOURS.index(identity.colour)
        if identity.shape in before:
            found["shape"] = 1 + SHAPES.index(identity.shape)
        if "ears" in words:
            found["ears"] = 1 + EARS.index(identity.ears)
        noun = PATTERN_NOUNS.get(identity.pattern)
        if identity.pattern in before or noun in words:
            found["pattern"] = 1 + PATTERNS.index(identity.pattern)
        if identity.second_colour is not None and noun in words:
            found["second_colour"] = 1 + COLOURS.index(identity.second_colour)
    return list(found.values())


def pretrain_text_encoder(
    tokenizer: CLIPTokenizer,
    out: Path,
    *,
    seconds: float,
    seed: int,
    device: torch.device,
    max_steps: int | None = None,
    batch_size: int = 96,
    learning_rate: float = 1.5e-3,
    progress: bool = True,
) -> float:
    """Teach the encoder to classify, at the end token and at the last padding, what is named.

    Args:
        tokenizer: of the model.
        out: folder for the model.
        seconds: training time.
        seed: of the weights and of every draw.
        device: CPU or CUDA.
        max_steps: ends training earlier.
        batch_size: captions a step.
        learning_rate: its peak.
        progress: show a progress bar.

    Returns:
        Share of right answers over all attributes in the last step.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    codes = CaptionCodes(tokenizer)
    encoder = make_text_encoder(tokenizer).to(device)
    heads = nn.ModuleList(nn.Linear(WIDTH, 1 + classes) for classes in _HEADS.values()).to(device)
    weights = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, learning_rate, betas=(0.9, 0.98), fused=True)
    budget = Budget("text encoder", seconds, max_steps, progress)
    accuracy = 0.0
    for step in budget.steps():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * budget.rate(step, warm_up=50, flat=0.0, end=0.05)
        ids, classes = _batch(codes, batch_size, rng, device)
        hidden = encoder(ids).last_hidden_state
        end = (ids == tokenizer.eos_token_id).int().argmax(1)
        rows = (hidden[torch.arange(batch_size, device=device), end], hidden[:, -1])
        answers = [[head(row) for row in rows] for head in heads]
        losses = [
            nn.functional.cross_entropy(answer, classes[:, k])
            for k, pair in enumerate(answers)
            for answer in pair
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        guesses = torch.stack([pair[0].argmax(1) for pair in answers], 1)
        accuracy = (guesses == classes).float().mean().item()
        budget.note = f"accuracy {accuracy:.3f}"
    encoder.save_pretrained(out)
    return accuracy


def _batch(
    codes: CaptionCodes, size: int, rng: random.Random, device: torch.device
) -> tuple[Tensor, Tensor]:
    ids, classes = [], []
    for _ in range(size):
        spec = random_spec(rng)
        text = caption(spec, rng)
        ids.append(codes(text))
        classes.append(named_attributes(text, spec))
    return torch.tensor(ids, device=device), torch.tensor(classes, device=device)
