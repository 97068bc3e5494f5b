"""Short runs of a pipeline, an independent sampling loop, and the state of a pipeline."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sefi_fast.subject import Subject

HINT = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(9))
both_families = pytest.mark.parametrize("family", ["sd15", "sdxl"])


def sample(pipe: Any, prompt: Any, seed: int = 0, **arguments: Any) -> Tensor:
    """Latents [B, 4, h, w] of a short run, without the decoder."""
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0} | arguments
    count = 1 if isinstance(prompt, str) or prompt is None else len(prompt)
    count *= settings.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return pipe(prompt, generator=generators, output_type="latent", **settings).images


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompt: Any, images: int = 1, guidance: bool = True, **arguments: Any
) -> tuple[Tensor | None, ...]:
    """Call the pipeline's encode_prompt as the pipeline does."""
    return pipe.encode_prompt(
        prompt,
        device=torch.device("cpu"),
        num_images_per_prompt=images,
        do_classifier_free_guidance=guidance,
        **arguments,
    )


def assert_close(actual: Tensor, expected: Tensor, atol: float = 2e-4) -> None:
    """Assert that two tensors differ by at most `atol` times the largest number, or 1."""
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol * largest)


def assert_differ(actual: Tensor, expected: Tensor) -> None:
    """Assert that two tensors differ by more than rounding."""
    assert (actual - expected).abs().max() > 1e-2


def twin(pipe: Any, kind: type | None = None, **parts: Any) -> Any:
    """Another pipeline over the same models, with a scheduler of its own."""
    kind = kind or type(pipe)
    given = pipe.components | {"requires_safety_checker": False} | parts
    known = inspect.signature(kind).parameters
    other = kind(**{name: part for name, part in given.items() if name in known})
    other.scheduler = copy.deepcopy(pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    return other


def run_threads(*works: Callable[[], Any]) -> None:
    """Run each function in a thread, and raise the first error."""
    errors: list[Exception] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def subject_for(
    pipe: Any,
    placeholder: str = "<it>",
    class_word: str = "cat",
    stages: int = 5,
    split: bool = True,
    distance: float = 1.0,
    vectors: int | None = None,
) -> Subject:
    """Subject whose tokens have this distance from its class word's rows: 0 if untrained."""
    generator = torch.Generator().manual_seed(len(placeholder) + stages)
    ids = [pipe.tokenizer.convert_tokens_to_ids(word + "</w>") for word in class_word.split()]
    tokens, rows = [], []
    for _, encoder in _text_encoders(pipe):
        own = encoder.get_input_embeddings().weight[ids].detach().clone()
        start = torch.cat([own, own[-1:].expand((vectors or len(ids)) - len(ids), -1)])
        noise = torch.randn(stages, 2 if split else 1, *start.shape, generator=generator)
        tokens.append(start + distance * own.std() * noise)
        rows.append(own)
    return Subject(placeholder, class_word, tokens, rows, base_model="random")


def _text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    names = ["", "_2"] if hasattr(pipe, "text_encoder_2") else [""]
    return [(getattr(pipe, f"tokenizer{n}"), getattr(pipe, f"text_encoder{n}")) for n in names]


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


def hooks_on(pipe: Any) -> list[Any]:
    """All forward hooks on the models of a pipeline."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    modules = [module for model in models for module in model.modules()]
    return [
        h for m in modules for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
    ]


def attend(
    attn: Attention, hidden: Tensor, key_prompt: Tensor, value_prompt: Tensor, mask: Any = None
) -> Tensor:
    """Return the output of an attention layer, by its projections and PyTorch's attention."""
    projected = (attn.to_q(hidden), attn.to_k(key_prompt), attn.to_v(value_prompt))
    q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
    output = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    return attn.to_out[0](output)


class _OracleAttention:
    """Plain attention whose keys and values come from prompts set from outside."""

    prompts: list[Tensor]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        if encoder_hidden_states is None:
            return attend(attn, hidden_states, hidden_states, hidden_states)
        return attend(attn, hidden_states, *self.prompts)


@torch.no_grad()
def encode_by_hand(
    pipe: Any, text: str, subjects: list[Subject], timestep: float, stream: int
) -> tuple[Tensor, Tensor]:
    """[1, 77, C] of one stream at one timestep, and SDXL's pooled embedding [1, 32].

    The rows of the stage are written into the token tables at the class words' places, so every
    subject needs a class word of its own that stands nowhere else in the text.
    """
    for subject in subjects:
        text = text.replace(subject.placeholder, subject.class_word)
    hidden = []
    for number, (tokenizer, encoder) in enumerate(_text_encoders(pipe)):
        table = encoder.get_input_embeddings().weight
        original = table.detach().clone()
        for subject in subjects:
            tokens = subject.tokens[number]
            stage = min(int(float(timestep) * len(tokens) / 1000), len(tokens) - 1)
            rows = tokens[stage, min(stream, tokens.shape[1] - 1)]
            for word, row in zip(subject.class_word.split(), rows, strict=True):
                table[tokenizer.convert_tokens_to_ids(word + "</w>")] = row
        ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        table.copy_(original)
        sdxl = hasattr(pipe, "text_encoder_2")
        hidden.append(output.hidden_states[-2] if sdxl else output[0])
    return torch.cat(hidden, -1), output[0]


@torch.no_grad()
def sample_by_hand(
    pipe: Any,
    prompt: str,
    subjects: list[Subject],
    *,
    value_prompt: str | None = None,
    negative: str | None = None,
    steps: int = 4,
    guidance: float = 5.0,
    seed: int = 0,
    pooled_stream: int = 1,
) -> Tensor:
    """Latents of `prompt` by a loop that shares no code with the library.

    Args:
        value_prompt: the sentence whose values are taken; `prompt` gives the keys alone then.
        pooled_stream: the stream that SDXL's pooled embedding comes from.
    """
    texts = [prompt, prompt if value_prompt is None else value_prompt]
    attention = _OracleAttention()
    replaced = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(attention)
    scheduler = pipe.scheduler.__class__.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 16, 16, generator=generator) * scheduler.init_noise_sigma
    empty = encode_by_hand(pipe, negative or "", [], 0, 0)
    if negative is None and pipe.config.get("force_zeros_for_empty_prompt"):
        empty = tuple(map(torch.zeros_like, empty))
    time_ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(2, -1)
    for t in scheduler.timesteps:
        encoded = [encode_by_hand(pipe, texts[i], subjects, float(t), i) for i in (0, 1)]
        attention.prompts, pooled = (
            [torch.cat([empty[field], one[field]]) for one in encoded] for field in (0, 1)
        )
        added = {"text_embeds": pooled[pooled_stream], "time_ids": time_ids}
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        noise = pipe.unet(model_input, t, attention.prompts[0], added_cond_kwargs=added).sample
        without, with_prompt = noise.chunk(2)
        noise = without + guidance * (with_prompt - without)
        latents = scheduler.step(noise, t, latents).prev_sample
    pipe.unet.set_attn_processor(replaced)
    return latents
