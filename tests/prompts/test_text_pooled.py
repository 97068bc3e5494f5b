"""What SDXL takes of a text encoder, against the encoder called by itself."""

from __future__ import annotations

import pytest
import torch

from sefi_fast.prompts import encode_text_pooled, text_encoders, tokenize_prompts

PLACEHOLDER = [("<me>", [7])]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("clip_skip", [None, 0, 1])
@torch.no_grad()
def test_hidden_state_and_pooled(sdxl_pipeline, number, clip_skip):
    tokenizer, encoder = text_encoders(sdxl_pipeline)[number]
    ids = tokenize_prompts(tokenizer, ["a cat", "a dog in the snow"], []).input_ids
    hidden, pooled = encode_text_pooled(encoder, ids, clip_skip=clip_skip)
    output = encoder(ids, output_hidden_states=True)
    assert torch.equal(hidden, output.hidden_states[-2 - (clip_skip or 0)])
    assert hidden.shape == (2, 77, (48, 64)[number])
    if number == 0:
        assert pooled is None
    else:
        assert torch.equal(pooled, output.text_embeds) and pooled.shape == (2, 32)


def test_rows_reach_both_and_carry_gradients(sdxl_pipeline):
    tokenizer, encoder = text_encoders(sdxl_pipeline)[1]
    encoder.requires_grad_(False)
    ids, slots = tokenize_prompts(tokenizer, ["a <me>", "the <me> in the snow"], PLACEHOLDER)
    rows = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden, pooled = encode_text_pooled(encoder, ids, slots, rows)
    by_hidden = torch.autograd.grad(hidden[0].square().sum(), rows, retain_graph=True)[0]
    by_pooled = torch.autograd.grad(pooled[1].square().sum(), rows)[0]
    assert by_hidden[0].abs().max() > 0 and not by_hidden[1].any()
    assert by_pooled[1].abs().max() > 0 and not by_pooled[0].any()
    plain, plain_pooled = encode_text_pooled(encoder, ids)
    assert (hidden - plain).abs().max() > 1e-2 and (pooled - plain_pooled).abs().max() > 1e-2


@pytest.mark.parametrize("clip_skip", [-1, 3])
def test_layers_that_are_not_there_are_told(sdxl_pipeline, clip_skip):
    tokenizer, encoder = text_encoders(sdxl_pipeline)[0]
    ids = tokenize_prompts(tokenizer, ["a cat"], []).input_ids
    with pytest.raises(ValueError, match="between 0 and 2 for a text encoder of 3 layers"):
        encode_text_pooled(encoder, ids, clip_skip=clip_skip)
