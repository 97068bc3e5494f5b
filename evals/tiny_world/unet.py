"""The U-Net of the bundled model, trained together with the text encoder on drawn pictures."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from evals.tiny_world.noising import Noising, make_scheduler
from evals.tiny_world.progress import Budget
from evals.tiny_world.text_encoder import WIDTH
from evals.tiny_world.tokenizer import CaptionCodes
from evals.tiny_world.vae import DOWNSCALING, LATENT_CHANNELS, encode_images
from sefi_fast.tiny_world.captions import caption
from sefi_fast.tiny_world.drawing import IMAGE_SIZE, ImageSpec

_CAPTION_DROPOUT = 0.1
_TEXT_RATE = 0.3
_AVERAGE = 0.997
_SNAPSHOT_SECONDS = 240


def make_unet() -> UNet2DConditionModel:
    """An untrained U-Net: cross-attention at 12×12 and 6×6, and in the middle at 3×3."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // DOWNSCALING,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=8,
    )


def train_unet(
    pictures: np.ndarray,
    specs: Sequence[ImageSpec],
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    save: Callable[[StableDiffusionPipeline], None],
    *,
    seconds: float,
    seed: int,
    device: torch.device,
    max_steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 1.5e-3,
    progress: bool = True,
) -> float:
    """Train the U-Net and, more slowly, the text encoder; hand pipelines of averaged weights out.

    Args:
        pictures: uint8 [N, 48, 48, 3].
        specs: what the pictures show; captions are worded anew each step.
        tokenizer: of the model.
        vae: trained, frozen here.
        text_encoder: pretrained.
        save: gets the pipeline (float16) every four minutes and at the end.
        seconds: training time.
        seed: of the weights and of every draw.
        device: CPU or CUDA.
        max_steps: ends training earlier.
        batch_size: pictures a step.
        learning_rate: its peak; the text encoder's is 0.3 of it.
        progress: show a progress bar.

    Returns:
        The running mean of the loss.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    codes = CaptionCodes(tokenizer)
    channels_last = torch.channels_last
    vae = vae.to(device, memory_format=channels_last).eval().requires_grad_(False)
    latents = encode_images(vae, pictures, device)
    unet = make_unet().to(device, memory_format=channels_last).train()
    unet.set_attn_processor(AttnProcessor())
    text_encoder = text_encoder.to(device).train()
    weights = [*unet.parameters(), *text_encoder.parameters()]
    averaged = copy.deepcopy(unet), copy.deepcopy(text_encoder)
    average = [weight for model in averaged for weight in model.requires_grad_(False).parameters()]
    groups = (unet.parameters(), 1.0), (text_encoder.parameters(), _TEXT_RATE)
    optimizer = torch.optim.AdamW(
        [{"params": list(members), "share": share} for members, share in groups],
        learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    noising = Noising(device)
    unprompted = torch.tensor(codes(""))
    budget = Budget("unet", seconds, max_steps, progress)
    saved = time.perf_counter()
    for step in budget.steps():
        rate = learning_rate * budget.rate(step, warm_up=100, flat=0.3, end=0.03)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        picks = rng.choices(range(len(specs)), k=batch_size)
        clean = latents[picks].to(device)
        ids = torch.tensor([codes(caption(specs[pick], rng)) for pick in picks])
        ids[torch.rand(batch_size) < _CAPTION_DROPOUT] = unprompted
        noisy, timesteps, wanted = noising(clean)
        with torch.autocast(device.type, torch.bfloat16):
            text = text_encoder(ids.to(device)).last_hidden_state
            velocity = unet(noisy, timesteps, text).sample
        loss = (velocity.float() - wanted).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        keep = min(_AVERAGE, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - keep)
        budget.follow(loss.item())
        if time.perf_counter() - saved > _SNAPSHOT_SECONDS:
            save(assemble(tokenizer, vae, averaged[1], averaged[0]))
            saved = time.perf_counter()
    save(assemble(tokenizer, vae, averaged[1], averaged[0]))
    return budget.loss


def assemble(
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """A pipeline of float16 copies on the CPU."""
    models = [copy.deepcopy(model).to("cpu", torch.float16).eval() for model in (vae, unet)]
    for model in models:
        # A model that was loaded would carry the folder's path into the saved configuration.
        model.register_to_config(_name_or_path="")
    return StableDiffusionPipeline(
        vae=models[0],
        text_encoder=copy.deepcopy(text_encoder).to("cpu", torch.float16).eval(),
        tokenizer=tokenizer,
        unet=models[1],
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
