"""Make the LoRA of the bundled model for two creatures in one image."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evals.tiny_world.loop import Loop, Settings
from evals.tiny_world.pairs import HALVES, draw_pair, random_pair
from evals.tiny_world.tokenizer import CaptionCodes
from evals.tiny_world.unet import CAPTION_DROPOUT, Noising
from evals.tiny_world.vae import encode_images
from sefi_fast.attention.processor import PromptState, SeFiAttnProcessor
from sefi_fast.attention.regions import RegionPrompts, down_factors
from sefi_fast.pipelines import load_pipeline
from sefi_fast.tiny_world.captions import caption, pair_caption
from sefi_fast.utils.files import atomic_write

_NARROWEST = 64
# Share of a batch with a sentence for each half instead of one for both.
_SHARE_BY_HALVES = 0.4


class LowRank(nn.Module):
    """A low-rank addition B·A to a weight; B starts at zero, as in LoRA (Hu et al., 2021, §4.1).

    Args:
        weight: weight of a linear layer [out, in] or of a convolution [out, in, height, width].
        rank: rank of the product.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        inputs = weight[0].numel()
        self.a = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.b = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


def train_two_creatures(
    out: Path, images: int, rank: int, settings: Settings, batch_size: int = 16
) -> float:
    """Train low-rank additions to the bundled U-Net on images of two creatures, and write them.

    The bundled weights and the text encoder stay as they are. Two images in five have a sentence
    for each half (`sefi_fast.regions`), so that the model obeys either form.

    Args:
        out: .safetensors file, float16, in the layout of diffusers' `load_lora_weights`.
        images: number of drawn images.
        rank: rank of the additions.
        settings: settings of the training.
        batch_size: images per step.

    Returns:
        The running mean of the loss.
    """
    torch.manual_seed(settings.seed)
    rng, device = random.Random(settings.seed), settings.device
    specs = [random_pair(rng) for _ in range(images)]
    pipe = load_pipeline(dtype=torch.float32, device=device)
    vae = pipe.vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    drawn = np.stack([np.asarray(draw_pair(spec)) for spec in specs])
    latents = encode_images(vae, drawn, settings.place)
    unet = pipe.unet.to(memory_format=torch.channels_last).requires_grad_(False)
    unet.set_attn_processor(SeFiAttnProcessor())
    text_encoder = pipe.text_encoder.eval().requires_grad_(False)
    codes, factors = CaptionCodes(pipe.tokenizer), down_factors(unet)
    layers = {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and min(layer.weight.shape[:2]) >= _NARROWEST
    }
    added = {name: LowRank(layer.weight, rank).to(device) for name, layer in layers.items()}
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", added[name], unsafe=True)
    loop = Loop(
        "two creatures", (weight for one in added.values() for weight in one.parameters()), 2e-3,
        settings, warm_up=100, flat=0.2, end=0.01,
    )  # fmt: skip
    noising, by_halves = Noising(settings.place), round(_SHARE_BY_HALVES * batch_size)
    for step in loop.steps():
        picks = rng.choices(range(images), k=batch_size)
        clean = latents[picks].to(device)
        shown = [specs[pick] for pick in picks]
        halved = shown[-by_halves:]
        # Sentences of both creatures, then of the left halves, then of the right halves.
        words = [pair_caption(spec.left, spec.right, rng) for spec in shown]
        words += [caption(half, rng) for half in [spec.left for spec in halved]]
        words += [caption(half, rng) for half in [spec.right for spec in halved]]
        ids = torch.tensor([codes("" if rng.random() < CAPTION_DROPOUT else w) for w in words])
        noisy, timesteps, wanted = noising(clean)
        with torch.autocast(device, torch.bfloat16):
            encoded = text_encoder(ids.to(device)).last_hidden_state
            text, left, right = encoded.split((batch_size, by_halves, by_halves))
            regions = RegionPrompts(
                (left, right), HALVES, by_halves, (clean.shape[2], clean.shape[3]), factors
            )
            PromptState(regions=regions).put_on(text)
            velocity = unet(noisy, timesteps, text).sample
        loop.descend((velocity.float() - wanted).pow(2).mean(), step)
    state = {}
    for name, low_rank in added.items():
        # PEFT's layout: a convolution's A has its window, its B a window of one pixel.
        outputs, *inputs = layers[name].weight.shape
        a = low_rank.a.detach().view(rank, *inputs)
        b = low_rank.b.detach().view(outputs, rank, *[1] * (len(inputs) - 1))
        for part, weight in (("A", a), ("B", b)):
            state[f"unet.{name}.lora_{part}.weight"] = weight.cpu().half().contiguous()
    atomic_write(out, save(state))
    return loop.loss
