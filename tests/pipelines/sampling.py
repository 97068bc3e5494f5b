"""Short runs of a pipeline, an independent sampling loop, and what a pipeline consists of."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from sefi_fast.subject import Subject


def draw(pipe: Any, prompt: Any, seed: int = 0, **arguments: Any) -> torch.Tensor:
    """Latents [B, 4, h, w] of a short run, without the decoder."""
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0} | arguments
    count = 1 if isinstance(prompt, str) or prompt is None else len(prompt)
    count *= settings.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return pipe(prompt, generator=generators, output_type="latent", **settings).images


def unet_in_another_thread(pipe: Any) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    """A bare call of the U-Net that another thread makes after every step of the pipeline.

    Returns:
        What it gives before anything is done, the list where its later results go, and the
        callback_on_step_end that makes the calls.
    """
    inputs = torch.randn(1, 4, 16, 16), torch.tensor(300), torch.randn(1, 77, 48)
    with torch.no_grad():
        expected = pipe.unet(*inputs).sample
    results: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.append(pipe.unet(*inputs).sample)

    def work_between_steps(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return tensors

    return expected, results, work_between_steps


def subject_for(
    pipe: Any,
    placeholder: str = "<it>",
    class_word: str = "cat",
    stages: int = 5,
    split: bool = True,
    distance: float = 1.0,
    vectors: int | None = None,
) -> Subject:
    """A subject whose tokens lie so far from its class word's rows: 0 for an untrained one."""
    encoders = [pipe.text_encoder]
    if hasattr(pipe, "text_encoder_2"):
        encoders.append(pipe.text_encoder_2)
    generator = torch.Generator().manual_seed(len(placeholder) + stages)
    ids = [pipe.tokenizer.convert_tokens_to_ids(word + "</w>") for word in class_word.split()]
    tokens, rows = [], []
    for encoder in encoders:
        own = encoder.get_input_embeddings().weight[ids].detach().clone()
        start = torch.cat([own, own[-1:].expand((vectors or len(ids)) - len(ids), -1)])
        noise = torch.randn(stages, 2 if split else 1, *start.shape, generator=generator)
        tokens.append(start + distance * own.std() * noise)
        rows.append(own)
    return Subject(placeholder, class_word, tokens, rows, base_model="random")


def state_of(pipe: Any) -> dict[str, Any]:
    """All that attaching may touch, by identity: to be equal after a detach."""
    state: dict[str, Any] = {"pipe": dict(vars(pipe))}
    for part in ("unet", "controlnet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, part, None)
        if model is None:
            continue
        for name, module in model.named_modules():
            attributes = dict(vars(module))
            for key, value in attributes.items():
                if isinstance(value, dict) and "hooks" in key:
                    attributes[key] = dict(value)
            for key in ("_parameters", "_buffers", "_modules"):
                attributes[key] = {n: id(v) for n, v in attributes[key].items()}
            if isinstance(module, Attention):
                attributes["processor"] = id(module.processor)
            state[f"{part}.{name}"] = attributes
    return state


class _OracleAttention:
    """Plain attention whose keys and values come from prompts set from outside."""

    key_prompt: torch.Tensor
    value_prompt: torch.Tensor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        prompts = (self.key_prompt, self.value_prompt)
        if encoder_hidden_states is None:
            prompts = (hidden_states, hidden_states)
        projected = (attn.to_q(hidden_states), attn.to_k(prompts[0]), attn.to_v(prompts[1]))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        output = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](output)


@torch.no_grad()
def sample_by_hand(
    pipe: Any,
    prompt: str,
    subjects: list[Subject],
    *,
    value_prompt: str | None = None,
    negative: str = "",
    steps: int = 4,
    guidance: float = 5.0,
    seed: int = 0,
) -> torch.Tensor:
    """Latents of `prompt` by a loop that shares no code with the library.

    value_prompt: the sentence whose values are taken; `prompt` gives the keys alone then.

    The rows of each stage are written into the token table at the class words' places, so every
    subject needs a class word of its own that stands nowhere else in the prompt.
    """
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    original = table.weight.detach().clone()

    def encode(text, stage_rows):
        ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        for words, rows in stage_rows.items():
            for word, row in zip(words.split(), rows, strict=True):
                table.weight[tokenizer.convert_tokens_to_ids(word + "</w>")] = row
        encoded = pipe.text_encoder(ids)[0]
        table.weight.copy_(original)
        return encoded

    texts = [prompt, prompt if value_prompt is None else value_prompt]
    for subject in subjects:
        texts = [text.replace(subject.placeholder, subject.class_word) for text in texts]
    attention = _OracleAttention()
    replaced = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(attention)
    scheduler = pipe.scheduler.__class__.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    size = pipe.unet.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=generator) * scheduler.init_noise_sigma
    empty = encode(negative, {})
    for t in scheduler.timesteps:
        prompts = []
        for stream in (0, 1):
            rows = {}
            for subject in subjects:
                tokens = subject.tokens[0]
                stage = min(int(float(t) * len(tokens) / 1000), len(tokens) - 1)
                rows[subject.class_word] = tokens[stage, min(stream, tokens.shape[1] - 1)]
            prompts.append(torch.cat([empty, encode(texts[stream], rows)]))
        attention.key_prompt, attention.value_prompt = prompts
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        without, with_prompt = pipe.unet(model_input, t, prompts[0]).sample.chunk(2)
        noise = without + guidance * (with_prompt - without)
        latents = scheduler.step(noise, t, latents).prev_sample
    pipe.unet.set_attn_processor(replaced)
    return latents
