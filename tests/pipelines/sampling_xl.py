"""An independent sampling loop for SDXL."""

from __future__ import annotations

from typing import Any

import torch
from pipelines.sampling import _OracleAttention

from sefi_fast.subject import Subject


@torch.no_grad()
def encode_by_hand(
    pipe: Any, prompt: str, subjects: list[Subject], stage: int, stages: int, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, 77, 112] and pooled [1, 32] of one stage and stream, from changed token tables.

    Every subject needs a class word of its own that stands nowhere else in the prompt.
    """
    for subject in subjects:
        prompt = prompt.replace(subject.placeholder, subject.class_word)
    hidden = []
    pooled = None
    for number, (tokenizer, encoder) in enumerate(
        [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    ):
        table = encoder.get_input_embeddings().weight
        original = table.detach().clone()
        for subject in subjects:
            tokens = subject.tokens[number]
            own_stage = stage * len(tokens) // stages
            rows = tokens[own_stage, min(stream, tokens.shape[1] - 1)]
            for word, row in zip(subject.class_word.split(), rows, strict=True):
                table[tokenizer.convert_tokens_to_ids(word + "</w>")] = row
        ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        table.copy_(original)
        hidden.append(output.hidden_states[-2])
        pooled = output[0]
    assert pooled is not None
    return torch.cat(hidden, -1), pooled


@torch.no_grad()
def sample_xl_by_hand(
    pipe: Any,
    prompt: str,
    subjects: list[Subject],
    *,
    negative: str | None = None,
    steps: int = 4,
    guidance: float = 5.0,
    seed: int = 0,
    pooled_stream: int = 1,
) -> torch.Tensor:
    """Latents of `prompt` by a loop that shares no code with the library, pooled from V."""
    attention = _OracleAttention()
    replaced = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(attention)
    scheduler = pipe.scheduler.__class__.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 16, 16, generator=generator) * scheduler.init_noise_sigma
    stages = max((subject.stages for subject in subjects), default=1)
    time_ids = torch.tensor([[128, 128, 0, 0, 128, 128]], dtype=torch.float32).expand(2, -1)
    for t in scheduler.timesteps:
        stage = min(int(float(t) * stages / 1000), stages - 1)
        prompts, pooled = [], []
        for stream in (0, 1):
            embeds, own_pooled = encode_by_hand(pipe, prompt, subjects, stage, stages, stream)
            if negative is None:
                empty, empty_pooled = torch.zeros_like(embeds), torch.zeros_like(own_pooled)
            else:
                empty, empty_pooled = encode_by_hand(pipe, negative, [], 0, 1, 0)
            prompts.append(torch.cat([empty, embeds]))
            pooled.append(torch.cat([empty_pooled, own_pooled]))
        attention.key_prompt, attention.value_prompt = prompts
        added = {"text_embeds": pooled[pooled_stream], "time_ids": time_ids}
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        noise = pipe.unet(model_input, t, prompts[0], added_cond_kwargs=added).sample
        without, with_prompt = noise.chunk(2)
        noise = without + guidance * (with_prompt - without)
        latents = scheduler.step(noise, t, latents).prev_sample
    pipe.unet.set_attn_processor(replaced)
    return latents
