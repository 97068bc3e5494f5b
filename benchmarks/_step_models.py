"""Stable Diffusion pipelines with random weights at the sizes of public configs, or narrower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from _shapes import TEXT_TOKENS
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sefi_fast import bundled_model_path

VOCABULARY = 49_408
_VAE_WIDTHS = (128, 256, 512, 512)


@dataclass(frozen=True)
class Architecture:
    """A model family at one width.

    `widths`, `heads`, `layers` are the U-Net's per level, `crossing` says which levels have
    transformers, `text` is (width, layers, heads) of the text encoder, `latent` the side of the
    latent, `groups` the groups of every normalisation, and `vae_widths` the VAE's channels.
    """

    name: str
    note: str
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    layers: tuple[int, ...]
    crossing: tuple[bool, ...]
    text: tuple[int, int, int]
    latent: int
    groups: int
    vae_widths: tuple[int, ...]
    linear_projection: bool


_SDXL_NOTE = (
    "sefi_fast does not train SDXL itself: this is SDXL's U-Net in size, without its added "
    "conditioning and under the larger of its two text encoders alone, for every contender"
)

# Configs of runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0.
SD15 = Architecture(
    name="sd15",
    note="the public config of Stable Diffusion 1.5",
    widths=(320, 640, 1280, 1280),
    heads=(8, 8, 8, 8),
    layers=(1, 1, 1, 1),
    crossing=(True, True, True, False),
    text=(768, 12, 12),
    latent=64,
    groups=32,
    vae_widths=_VAE_WIDTHS,
    linear_projection=False,
)
SDXL = Architecture(
    name="sdxl-sized",
    note=_SDXL_NOTE,
    widths=(320, 640, 1280),
    heads=(5, 10, 20),
    layers=(1, 2, 10),
    crossing=(False, True, True),
    text=(1280, 32, 20),
    latent=128,
    groups=32,
    vae_widths=_VAE_WIDTHS,
    linear_projection=True,
)
FULL_WIDTH = {"sd15": SD15, "sdxl": SDXL}


def reduced(full: Architecture, quick: bool) -> Architecture:
    """The same depth, head widths and prompt length on a CPU's scale: fewer heads and channels.

    SD 1.5 becomes 8 times narrower (1 head of 40, 80 and 160), SDXL 5 times (heads of 64). The
    latent of SD 1.5 keeps its side, that of SDXL a quarter of it; `quick` halves both.
    """
    factor = 8 if full is SD15 else 5
    text_width, text_layers, text_heads = full.text
    return Architecture(
        name=full.name,
        note=f"{full.note}; {factor} times narrower in every part",
        widths=tuple(width // factor for width in full.widths),
        heads=tuple(heads // factor for heads in full.heads),
        layers=full.layers,
        crossing=full.crossing,
        text=(text_width // factor, text_layers, max(1, text_heads // factor)),
        latent=(64 if full is SD15 else 32) // (2 if quick else 1),
        groups=8,
        vae_widths=tuple(width // 8 for width in full.vae_widths),
        linear_projection=full.linear_projection,
    )


def _unet(built: Architecture) -> UNet2DConditionModel:
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
        cross_attention_dim=built.text[0],
        norm_num_groups=built.groups,
        use_linear_projection=built.linear_projection,
    )


def _text_encoder(built: Architecture, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    width, layers, heads = built.text
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def random_pipeline(
    built: Architecture, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> StableDiffusionPipeline:
    """A frozen pipeline with random weights: U-Net and VAE in `dtype`, text encoder in float32.

    The prompts are cut into tokens by the bundled model's tokenizer, which has few words; the
    token table has all of CLIP's rows.
    """
    tokenizer = CLIPTokenizer.from_pretrained(
        bundled_model_path() / "tokenizer", model_max_length=TEXT_TOKENS
    )
    torch.manual_seed(seed)
    with torch.device(device):
        text_encoder = _text_encoder(built, tokenizer)
        unet = _unet(built)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=built.vae_widths,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=built.groups,
            sample_size=8 * built.latent,
        )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if dtype != torch.float32:
        pipe.unet.to(dtype)
        pipe.vae.to(dtype)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return pipe
