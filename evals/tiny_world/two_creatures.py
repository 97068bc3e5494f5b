"""The command that makes the LoRA by which the bundled model draws two creatures in a picture."""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evals.tiny_world.noising import Noising
from evals.tiny_world.progress import Budget
from evals.tiny_world.tokenizer import CaptionCodes
from evals.tiny_world.vae import encode_images
from sefi_fast.attention.processor import PromptState, SeFiAttnProcessor
from sefi_fast.attention.regions import RegionPrompts, down_factors
from sefi_fast.pipelines import load_pipeline
from sefi_fast.tiny_world.captions import caption, pair_caption
from sefi_fast.tiny_world.pairs import HALVES, PairSpec, draw_pair, random_pair
from sefi_fast.utils.files import atomic_write

_CAPTION_DROPOUT = 0.1
_NARROWEST = 64
# Share of a batch that has a sentence for each half instead of one for both.
_SHARE_BY_HALVES = 0.4


class _Sentences:
    """Token ids of captions worded anew: one for both creatures, one for each of them.

    Args:
        codes: of the bundled model's tokenizer.
        rng: where every choice comes from.
    """

    def __init__(self, codes: CaptionCodes, rng: random.Random) -> None:
        self._codes, self._rng = codes, rng

    def of_both(self, specs: Sequence[PairSpec]) -> Tensor:
        """[pictures, tokens]; one in ten says nothing, for guidance."""
        words = [pair_caption(spec.left, spec.right, self._rng) for spec in specs]
        return self._ids(words)

    def of_each(self, specs: Sequence[PairSpec]) -> Tensor:
        """[2 · pictures, tokens], those of the left halves first."""
        halves = [spec.left for spec in specs] + [spec.right for spec in specs]
        return self._ids([caption(half, self._rng) for half in halves])

    def _ids(self, words: Sequence[str]) -> Tensor:
        dropped = ("" if self._rng.random() < _CAPTION_DROPOUT else text for text in words)
        return torch.tensor([self._codes(text) for text in dropped])


class LowRank(nn.Module):
    """Adds B·A to a weight; B starts at zero, as in LoRA (Hu et al., 2021, §4.1).

    Args:
        weight: of a linear layer [out, in] or of a convolution [out, in, height, width].
        rank: of the product.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        inputs = weight[0].numel()
        self.a = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.b = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


def train_two_creatures(
    out: Path,
    *,
    minutes: float = 25.0,
    threads: int = 2,
    seed: int = 0,
    device: str = "cpu",
    pictures: int = 12_000,
    rank: int = 32,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    max_steps: int | None = None,
    progress: bool = True,
) -> float:
    """Train low-rank additions to the bundled U-Net on pictures of two creatures, and write them.

    The bundled weights stay as they are, and so does the text encoder. Two pictures in five have
    a sentence for each half (`sefi_fast.regions`), so that the model can be asked in either way.

    Args:
        out: .safetensors file, float16, in the layout of diffusers' `load_lora_weights`.
        minutes: training time.
        threads: CPU threads of PyTorch.
        seed: of the pictures and every draw. The budget is in time, so two runs differ in steps.
        device: "cpu" or "cuda".
        pictures: how many are drawn.
        rank: of the additions.
        batch_size: pictures a step.
        learning_rate: its peak.
        max_steps: ends training earlier.
        progress: show a progress bar.

    Returns:
        The running mean of the loss.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    specs = [random_pair(rng) for _ in range(pictures)]
    drawn = np.stack([np.asarray(draw_pair(spec)) for spec in specs])
    pipe = load_pipeline(dtype=torch.float32, device=device)
    channels_last = torch.channels_last
    vae = pipe.vae.to(memory_format=channels_last).eval().requires_grad_(False)
    latents = encode_images(vae, drawn, torch.device(device))
    unet = pipe.unet.to(memory_format=channels_last).requires_grad_(False)
    text_encoder = pipe.text_encoder.eval().requires_grad_(False)
    sentences = _Sentences(CaptionCodes(pipe.tokenizer), rng)
    unet.set_attn_processor(SeFiAttnProcessor())
    factors = down_factors(unet)
    by_halves = round(_SHARE_BY_HALVES * batch_size)
    layers = {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and min(layer.weight.shape[:2]) >= _NARROWEST
    }
    added = {name: LowRank(layer.weight, rank).to(device) for name, layer in layers.items()}
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", added[name], unsafe=True)
    weights = [weight for one in added.values() for weight in one.parameters()]
    optimizer = torch.optim.AdamW(
        weights, learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    noising = Noising(torch.device(device))
    budget = Budget("two creatures", 60 * minutes, max_steps, progress)
    for step in budget.steps():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * budget.rate(step, warm_up=100, flat=0.2, end=0.01)
        picks = rng.choices(range(pictures), k=batch_size)
        clean = latents[picks].to(device)
        shown = [specs[pick] for pick in picks]
        ids = torch.cat([sentences.of_both(shown), sentences.of_each(shown[-by_halves:])])
        noisy, timesteps, wanted = noising(clean)
        with torch.autocast(device, torch.bfloat16):
            encoded = text_encoder(ids.to(device)).last_hidden_state
            text, left, right = encoded.split((batch_size, by_halves, by_halves))
            regions = RegionPrompts(
                (left, right), HALVES, by_halves, (clean.shape[2], clean.shape[3]), factors
            )
            PromptState(regions=regions).put_on(text)
            velocity = unet(noisy, timesteps, text).sample
        loss = (velocity.float() - wanted).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        budget.follow(loss.item())
    _save(out, layers, added, rank)
    return budget.loss


def _save(
    out: Path, layers: dict[str, nn.Linear | nn.Conv2d], added: dict[str, LowRank], rank: int
) -> None:
    """As PEFT keeps LoRA: a convolution's A has its window, its B a window of one pixel."""
    state = {}
    for name, low_rank in added.items():
        outputs, *inputs = layers[name].weight.shape
        a = low_rank.a.detach().view(rank, *inputs)
        b = low_rank.b.detach().view(outputs, rank, *[1] * (len(inputs) - 1))
        for part, weight in (("A", a), ("B", b)):
            state[f"unet.{name}.lora_{part}.weight"] = weight.cpu().half().contiguous()
    atomic_write(out, save(state))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m evals.tiny_world.two_creatures``."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.tiny_world.two_creatures", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file of the LoRA")
    parser.add_argument("--minutes", type=float, default=25.0, help="training time (default: 25)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--pictures", type=int, default=12_000, help="drawn (default: 12000)")
    parser.add_argument("--rank", type=int, default=32, help="of the additions (default: 32)")
    options = parser.parse_args(arguments)
    if min(options.minutes, options.threads, options.rank) <= 0 or options.pictures < 16:
        parser.error("--minutes, --threads and --rank must be above 0, --pictures at least 16")
    loss = train_two_creatures(**vars(options))
    print(f"{options.out}: loss {loss:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
