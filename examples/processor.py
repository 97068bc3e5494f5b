"""Put the drop-in processor on a U-Net of diffusers, and give it separate K and V prompts."""

from __future__ import annotations

import torch

import sefi_fast

pipe = sefi_fast.load_pipeline(sefi_fast.bundled_model_path())
unet = pipe.unet
size = unet.config.sample_size
latents = torch.randn(1, unet.config.in_channels, size, size, generator=torch.manual_seed(0))


def embeds(prompt: str) -> torch.Tensor:
    """Return [1, M, C]."""
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


with torch.no_grad():
    prompt = embeds("a photo of a blue creature with a hat in the snow")
    before = unet(latents, 500, prompt).sample
    unet.set_attn_processor(sefi_fast.SeFiAttnProcessor())
    after = unet(latents, 500, prompt).sample
    print("largest difference to the default processor:", (after - before).abs().max().item())

    # Keys from one prompt, values from another: [1, 2·M, C].
    unet.set_attn_processor(sefi_fast.SeFiAttnProcessor(split_streams=True))
    other = embeds("a photo of a blue creature with a crown in the snow")
    mixed = unet(latents, 500, torch.cat([prompt, other], dim=1)).sample
    print("largest change with values of another prompt:", (mixed - before).abs().max().item())
