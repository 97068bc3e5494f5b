"""Random-weight Stable Diffusion pipelines at the sizes of public configs, or narrower."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from common.shapes import TEXT_TOKENS
from sefi_fast import bundled_model_path
from sefi_fast.prompts import text_encoders

VOCABULARY = 49_408
_VAE_WIDTHS = (128, 256, 512, 512)
# Each of SDXL's six numbers of size and crop as sines and cosines, at any width of the networks.
_SIZES, _SIZE_WIDTH = 6, 256


class TextShape(NamedTuple):
    """A CLIP text encoder's width, number of layers, and heads."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Architecture:
    """A model family at one width.

    `widths`, `heads`, `layers` are the U-Net's per level, `crossing` says which levels have
    transformers, `texts` are the text encoders, `latent` is the side of the latent, `groups` the
    groups of every normalisation, and `vae_widths` are the VAE's channels.
    """

    name: str
    note: str
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    layers: tuple[int, ...]
    crossing: tuple[bool, ...]
    texts: tuple[TextShape, ...]
    latent: int
    groups: int
    vae_widths: tuple[int, ...]
    linear_projection: bool

    @property
    def is_sdxl(self) -> bool:
        """Return whether the U-Net gets a second text encoder's pooled embedding, size and crop."""
        return len(self.texts) == 2

    @property
    def context_width(self) -> int:
        """Return the width of the text encoders' outputs, concatenated."""
        return sum(text.width for text in self.texts)


# Configs of runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0.
SD15 = Architecture(
    name="sd15",
    note="the public config of Stable Diffusion 1.5",
    widths=(320, 640, 1280, 1280),
    heads=(8, 8, 8, 8),
    layers=(1, 1, 1, 1),
    crossing=(True, True, True, False),
    texts=(TextShape(768, 12, 12),),
    latent=64,
    groups=32,
    vae_widths=_VAE_WIDTHS,
    linear_projection=False,
)
SDXL = Architecture(
    name="sdxl",
    note="the public config of Stable Diffusion XL base 1.0",
    widths=(320, 640, 1280),
    heads=(5, 10, 20),
    layers=(1, 2, 10),
    crossing=(False, True, True),
    texts=(TextShape(768, 12, 12), TextShape(1280, 32, 20)),
    latent=128,
    groups=32,
    vae_widths=_VAE_WIDTHS,
    linear_projection=True,
)
FULL_WIDTH = {built.name: built for built in (SD15, SDXL)}


class _Reduction(NamedTuple):
    """Divisors of the widths of U-Net and text encoders, and the side of the latent."""

    unet: int
    texts: tuple[int, ...]
    latent: int


# 5 does not divide the 12 heads of SDXL's first text encoder.
_REDUCTIONS = {"sd15": _Reduction(8, (8,), 64), "sdxl": _Reduction(5, (6, 5), 32)}
_VAE_FACTOR = 8


def reduced(full: Architecture, quick: bool) -> Architecture:
    """Return the same depth, head_dims and prompt length with fewer heads and channels, for a CPU.

    The U-Net of SD 1.5 becomes 8 times narrower (1 head of 40, 80 and 160), SDXL's 5 times (heads
    of 64). The latent of SD 1.5 keeps its side, that of SDXL a quarter of it; `quick` halves both.
    """
    unet, texts, latent = _REDUCTIONS[full.name]
    by_part = f"U-Net {unet}, text {' and '.join(map(str, texts))}, VAE {_VAE_FACTOR}"
    return replace(
        full,
        note=f"{full.note}; {by_part} times narrower",
        widths=tuple(width // unet for width in full.widths),
        heads=tuple(heads // unet for heads in full.heads),
        texts=tuple(
            TextShape(text.width // factor, text.layers, max(1, text.heads // factor))
            for text, factor in zip(full.texts, texts, strict=True)
        ),
        latent=latent // (2 if quick else 1),
        groups=8,
        vae_widths=tuple(width // _VAE_FACTOR for width in full.vae_widths),
    )


def _unet(built: Architecture) -> UNet2DConditionModel:
    added: dict[str, Any] = {}
    if built.is_sdxl:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _SIZE_WIDTH,
            "projection_class_embeddings_input_dim": built.texts[1].width + _SIZES * _SIZE_WIDTH,
        }
    return UNet2DConditionModel(
        sample_size=built.latent,
        block_out_channels=built.widths,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if crosses else "DownBlock2D" for crosses in built.crossing
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if crosses else "UpBlock2D" for crosses in built.crossing[::-1]
        ),
        # The name is historical: in these configs it is the number of heads.
        attention_head_dim=built.heads,
        transformer_layers_per_block=built.layers,
        cross_attention_dim=built.context_width,
        norm_num_groups=built.groups,
        use_linear_projection=built.linear_projection,
        **added,
    )


def _text_encoder(kind: type, shape: TextShape, tokenizer: CLIPTokenizer, **options: Any) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            projection_dim=shape.width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    )


def _vae(built: Architecture) -> AutoencoderKL:
    own = {"scaling_factor": 0.13025, "force_upcast": True} if built.is_sdxl else {}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=built.vae_widths,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=built.groups,
        sample_size=8 * built.latent,
        **own,
    )


def random_pipeline(
    built: Architecture, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Return a frozen random-weight pipeline: U-Net and VAE in `dtype`, text encoders in float32.

    The prompts are cut into tokens by the bundled model's tokenizer, which has few words; the
    token tables have all of CLIP's rows.
    """
    folder = bundled_model_path() / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_TOKENS)
    torch.manual_seed(seed)
    with torch.device(device):
        parts: dict[str, Any] = {
            "text_encoder": _text_encoder(CLIPTextModel, built.texts[0], tokenizer),
            "tokenizer": tokenizer,
            "unet": _unet(built),
            "vae": _vae(built),
        }
    parts["scheduler"] = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    pipe = _sdxl(built, device, parts) if built.is_sdxl else _sd(parts)
    if dtype != torch.float32:
        pipe.unet.to(dtype)
        pipe.vae.to(dtype)
    for part in (pipe.unet, pipe.vae, *(part.text_encoder for part in text_encoders(pipe))):
        part.requires_grad_(False).eval()
    return pipe


def _sd(parts: dict[str, Any]) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _sdxl(
    built: Architecture, device: torch.device, parts: dict[str, Any]
) -> StableDiffusionXLPipeline:
    # SDXL's second tokenizer has the first one's words and pads with another of them.
    tokenizer = CLIPTokenizer.from_pretrained(
        bundled_model_path() / "tokenizer", model_max_length=TEXT_TOKENS, pad_token="!"
    )
    with torch.device(device):
        text_encoder = _text_encoder(
            CLIPTextModelWithProjection, built.texts[1], tokenizer, hidden_act="gelu"
        )
    return StableDiffusionXLPipeline(
        **parts, tokenizer_2=tokenizer, text_encoder_2=text_encoder, add_watermarker=False
    )
